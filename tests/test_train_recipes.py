"""The recipes that come with gm-mlx: their values are the papers', and each of their stages runs."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import eve_models
import numpy as np
import pytest
import yaml
from fixtures import tiny_config, tiny_folder, tiny_model
from lora_models import CONFIGS
from training_data import images_in, llava, write_lines

import gm_mlx
from gm_mlx.capacity import Capacity
from gm_mlx.chat_template import GEMMA, V1
from gm_mlx.cli.main import main
from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.evf import ImgGBPR
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.presets import EVF
from gm_mlx.processor import Processor
from gm_mlx.train.recipes import FOLDERS, Recipe, Stage, parse_stage, read_recipe, recipe_names
from gm_mlx.weights import load_model, named_arrays

FILES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
STAGES = [(file.stem, number) for file in FILES for number in yaml.safe_load(file.read_text())["stages"]]

# A dense model of each system's kind, and its template.
MODELS = {
    "llava-gm": (tiny_config("clip", moe=None, tie_word_embeddings=True), GEMMA),
    "moe-llava": (tiny_config("clip", moe=None, **CONFIGS["phi"]), V1),
    "eve": (eve_models.DENSE, V1),
}


def model_of(recipe: str, folder: Path) -> Path:
    config, template = MODELS[recipe]
    tiny_folder(folder, model=tiny_model(config=config), template=template)
    own = Processor.from_folder(folder)
    assert own.image is not None
    dataclasses.replace(own, image=dataclasses.replace(own.image, mode="pad")).save(folder)
    return folder


def data_in(folder: Path) -> Path:
    images_in(folder, 4)
    records = [llava("<image>what is this?", "a dog" if n % 2 else "the cat", image=f"{n % 4}.png") for n in range(12)]
    return write_lines(folder / "data.jsonl", records)


# --- the files ---


def test_every_file_has_a_name_and_a_model_here() -> None:
    assert recipe_names() == [file.stem for file in FILES] == sorted(MODELS)
    assert FILES[0].parent in FOLDERS


@pytest.mark.parametrize(("name", "number"), STAGES)
def test_every_stage_runs(name: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of it, by the command, with all of its values but the rows of a step."""
    base, data, out = model_of(name, tmp_path / "model"), data_in(tmp_path / "data"), tmp_path / "out"
    options = ["--stage", str(number), "--recipe", name, "--steps", "2", "--batch-size", "4", "--workers", "0"]
    code = main(["train", "--model", str(base), "--data", str(data), "-o", str(out), *options, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report, stage = json.loads(captured.out), read_recipe(name).stage(number)
    assert (report["steps"], report["learning_rate"]) == (2, stage.hyperparameters["learning_rate"])
    assert (report["recipe"], report["stage"], report["rows"]) == (read_recipe(name).name, number, 12)
    assert np.isfinite(report["loss"])
    run = json.loads((tmp_path / "out.run" / "log.jsonl").read_text().splitlines()[0])
    if stage.lora is not None:
        assert (out / "adapter_model.safetensors").is_file()
        return
    model = load_model(out)
    assert model.config.text_config.moe == stage.moe
    if stage.moe is not None:
        assert (
            set(run["load_entropy"]) == set(run["dropped"]) == {str(i) for i in model.config.text_config.sparse_layers}
        )
    changed = [name for name, array in named_arrays(model).items() if not same(array, base, name)]
    assert changed


def same(array: Any, base: Path, name: str) -> bool:
    before = named_arrays(load_model(base))
    return name in before and np.array_equal(np.array(array), np.array(before[name]))


# What the papers and their code say; see the notes in the files.
ADAM, HALF = [0.9, 0.999], 0.03
PAPERS: dict[tuple[str, int], dict[str, Any]] = {
    ("llava-gm", 1): {"trains": ("projector",), "batch_size": 32, "betas": ADAM, "weight_decay": 0.01},
    ("llava-gm", 2): {
        "trains": ("projector", "decoder"), "batch_size": 32, "epochs": 3, "learning_rate": 2e-5, "betas": ADAM,
        "weight_decay": 0.01,
    },
    ("llava-gm", 3): {
        "trains": ("moe",), "batch_size": 32, "epochs": 3, "learning_rate": 2e-5, "betas": ADAM, "weight_decay": 0.01,
        "moe": MoEConfig(num_experts=4, top_k=2, mode="sparse"), "second_expert": "largest",
    },
    ("moe-llava", 1): {
        "trains": ("projector",), "template": "plain", "image_mode": "crop", "batch_size": 256, "epochs": 1,
        "learning_rate": 1e-3, "warmup": HALF, "schedule": "cosine", "betas": ADAM, "weight_decay": 0.0,
    },
    ("moe-llava", 2): {
        "trains": ("projector", "decoder"), "image_mode": "pad", "batch_size": 128, "epochs": 1, "learning_rate": 2e-5,
        "warmup": HALF, "schedule": "cosine", "betas": ADAM, "weight_decay": 0.0, "max_length": 2048,
    },
    ("moe-llava", 3): {
        "trains": ("moe",), "batch_size": 128, "epochs": 1, "learning_rate": 2e-5, "warmup": HALF,
        "schedule": "cosine", "betas": ADAM, "weight_decay": 0.0, "aux_loss_coef": 0.01,
        "moe": MoEConfig(num_experts=4, top_k=2, mode="sparse", aux_loss_coef=0.01),
        "capacity": Capacity(factor=1.5, min_capacity=0, by="position"), "max_length": 2048, "second_expert": "drawn",
    },
    ("eve", 1): {
        "trains": ("projector",), "batch_size": 256, "learning_rate": 1e-3, "warmup": HALF, "schedule": "cosine",
        "betas": [0.9, 0.95], "weight_decay": 0.0,
    },
    ("eve", 2): {
        "trains": (), "batch_size": 128, "learning_rate": 2e-5, "warmup": HALF, "schedule": "cosine",
        "betas": [0.9, 0.95], "weight_decay": 0.0,
    },
    ("eve", 3): {
        "trains": ("moe",), "batch_size": 128, "learning_rate": 2e-5, "warmup": HALF, "schedule": "cosine",
        "betas": [0.9, 0.95], "weight_decay": 0.0, "aux_loss_coef": 0.001, "moe": EVF,
        "allocation": ImgGBPR(capacity_factor=1.5, moved=0.5),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), STAGES)
def test_the_papers_values(name: str, number: int) -> None:
    stage = read_recipe(name).stage(number)
    for key, value in PAPERS[name, number].items():
        own = stage.hyperparameters[key] if key in stage.hyperparameters else getattr(stage, key)
        assert (list(own) if key == "betas" else own) == value, key


def test_every_value_says_where_it_is_from() -> None:
    for file in FILES:
        for line in file.read_text().splitlines():
            if re.match(r" {4,}\w", line):
                assert re.search(r"  # (paper|code|ours)\b", line), f"{file.name}: {line}"


# --- files of users ---


def recipe_in(folder: Path, text: str) -> Recipe:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return read_recipe(str(file))


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = """
name: Mine
stages:
  2:
    lora: {rank: 4, alpha: 8, targets: attention, rslora: true}
    learning_rate: 1e-4
    betas: [0.8, 0.9]
    rows: 3
  7:
    trains: all_ffn
    upcycle: 8x1@1,3
    router_rank: 2
    residual: true
    aux_loss_coef: 1
    second_expert: drawn
    capacity: {by: priority}
    learning_rate: 5
"""
    recipe = recipe_in(tmp_path, text)
    assert recipe.stages[2] == Stage(
        {"learning_rate": 1e-4, "betas": (0.8, 0.9)},
        lora=LoRAConfig(rank=4, alpha=8, targets=("attention",), rslora=True),
        rows=3,
    )
    moe = MoEConfig(8, 1, "custom", (1, 3), router_rank=2, use_residual=True, aux_loss_coef=1)
    room = Capacity(by="priority")
    stage = Stage({"learning_rate": 5}, ("all_ffn",), moe=moe, aux_loss_coef=1, second_expert="drawn", capacity=room)
    assert recipe.stages[7] == stage
    assert [recipe.stages[2].parts(8, ranks) for ranks in (1, 2, 3)] == [3, 2, 1]
    assert stage.parts(100) == 1
    changed = recipe.stage(7, {"upcycle": None, "router_rank": None, "residual": None, "trains": ["experts"]})
    assert changed == dataclasses.replace(stage, moe=None, trains=("experts",))
    with pytest.raises(UserError, match=r"--stage 1: .*mine\.yaml has the stages 2, 7; choose one of them"):
        recipe.stage(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"mine\.yaml: not valid YAML \(.*line 1.*\); correct it"),
        ("name: x\nname: y\nstages: {}", r"not valid YAML \('name' stands there twice"),
        ("!!python/object/apply:os.system ['true']", r"not valid YAML \(could not determine a constructor"),
        ("- 1", r"mine\.yaml: is \[1\] and not a table of keys"),
        ("name: x\nstage: {}", r"mine\.yaml: stage: the recipe has no such key; it may have name, stages"),
        ("name: x", r"mine\.yaml: needs a name, and stages by number"),
        ("name: x\nstages: {one: {}}", r"mine\.yaml: stages: 'one' is not a number"),
        ("name: x\nstages: {1: 2}", r"mine\.yaml: stage 1: is 2 and not a table of keys"),
        ("name: x\nstages: {1: {trains: moe}}", r"mine\.yaml: stage 1: learning_rate: is missing"),
    ],
)
def test_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        recipe_in(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 1}, "lr: a stage has no such key; it may have trains, lora,"),
        ({"steps": 5}, "steps: a stage has no such key"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not a number above 0"),
        ({"schedule": "step"}, "schedule: 'step' is not one of"),
        ({"betas": [0.9]}, r"betas: \[0.9\] is not two numbers"),
        ({"checkpoint": "yes"}, "checkpoint: 'yes' is not true or false"),
        ({"trains": ["head"]}, "trains: 'head' is not one of tower, projector"),
        ({"trains": []}, r"trains: \[\] is not a list of names"),
        ({"trains": None}, "trains: None is not a list of names"),
        ({"lora": {}}, "trains: says what learns whole, lora what gets an adapter; give one of the two"),
        ({"template": "chatml"}, "template: 'chatml' is not one of gemma, v1, plain"),
        ({"image_mode": "stretch"}, "image_mode: 'stretch' is not one of pad, crop, resize"),
        ({"epochs": 0}, "epochs: 0 is not a number of 1e-06 or more"),
        ({"epochs": float("nan")}, "epochs: nan is not a number"),
        ({"epochs": float("inf")}, "epochs: inf is not a number"),
        ({"batch_size": 1.5}, "batch_size: 1.5 is not a whole number of 1 or more"),
        ({"rows": 0}, "rows: 0 is not a whole number of 1 or more"),
        ({"rows": True}, "rows: True is not a whole number"),
        ({"max_length": "2k"}, "max_length: '2k' is not a whole number"),
        ({"upcycle": "4"}, "upcycle: '4': not EXPERTSxTOP_K"),
        ({"router_rank": 2}, "router_rank: is of experts that are made; give upcycle too"),
        ({"residual": True}, "residual: is of experts that are made; give upcycle too"),
        ({"upcycle": "4x2", "residual": 1}, "residual: 1 is not true or false"),
        ({"aux_loss_coef": -1}, "aux_loss_coef: -1 is not a number of 0 or more"),
        ({"z_loss_coef": "0"}, "z_loss_coef: '0' is not a number"),
        ({"second_expert": "third"}, "second_expert: 'third' is not one of largest, drawn"),
        ({"capacity": 1.5}, "capacity: is 1.5 and not a table of keys"),
        ({"capacity": {"size": 1}}, "capacity: size: this has no such key; it may have factor, min_capacity, by"),
        ({"capacity": {"factor": "1"}}, "capacity: factor: '1' is not a number"),
        ({"capacity": {"factor": 0}}, "capacity: .*factor"),
        ({"capacity": {"by": "age"}}, "capacity: .*'age'"),
        ({"allocation": {"moved": 2}}, "allocation: moved: 2 is not between 0 and 1"),
    ],
)
def test_stages_that_are_none(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_stage({"trains": ["projector"], "learning_rate": 1e-3, **keys})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 8}, "lora: r: this has no such key; it may have rank, alpha"),
        ({"rank": 0}, "lora: rank: 0 is not a whole number of 1 or more"),
        ({"rank": "8"}, "lora: rank: '8' is not a whole number"),
        ({"rslora": "no"}, "lora: rslora: 'no' is not true or false"),
        ({"targets": 3}, "lora: targets: 3 is not a list of names"),
        ({"targets": ["("]}, "lora: .*not a pattern"),
    ],
)
def test_adapters_that_are_none(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_stage({"lora": lora, "learning_rate": 1e-3})


def test_an_adapter_is_not_made_with_experts() -> None:
    with pytest.raises(UserError, match="upcycle: an adapter is for a model that is there; make that by gm-mlx"):
        parse_stage({"lora": {}, "upcycle": "4x2", "learning_rate": 1e-3})


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--recipe llava: no such recipe; name one of eve, llava-gm, moe-llava, or"):
        read_recipe("llava")
    with pytest.raises(UserError, match=r"--recipe .*none\.yaml: no such file"):
        read_recipe(str(tmp_path / "none.yaml"))
    for name in ("../recipes/eve", "", "/etc/passwd"):
        with pytest.raises(UserError, match="no such recipe"):
            read_recipe(name)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: cannot be read"):
        read_recipe(str(tmp_path / "binary.yaml"))


def test_they_are_installed_with_the_package() -> None:
    """What ``FOLDERS`` looks into is where setuptools puts them."""
    tools = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tools["package-dir"]["gm_mlx.recipes"] == "examples/recipes" and "gm_mlx.recipes" in tools["packages"]
    assert tools["package-data"]["gm_mlx.recipes"] == ["*.yaml"]
    assert FOLDERS[0] == Path(gm_mlx.__file__).parent / "recipes"
