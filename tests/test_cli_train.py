"""``gm-mlx train`` as a user types it, on tiny models: from folder to folder through the stages."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from lora_models import model_of
from test_train_stages import component_of
from training_data import images_in, llava, write_lines

import gm_mlx
from gm_mlx.chat_template import PLAIN
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.processor import Processor
from gm_mlx.tensors import open_safetensors
from gm_mlx.train.recipes import read_recipe

QUICK = ("--steps", "2", "--batch-size", "4", "--workers", "0")
DENSE = tiny_config("clip", moe=None, tie_word_embeddings=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "start", model=tiny_model(config=DENSE))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images_in(tmp_path / "photos", 4)
    records = [llava("<image>what is this?", "a dog" if n % 2 else "the cat", image=f"{n % 4}.png") for n in range(12)]
    return write_lines(tmp_path / "photos" / "data.jsonl", records)


def command(stage: int, base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--stage", str(stage), "--model", str(base), "--data", str(data), "-o", str(out), *QUICK, *more]


def report(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*command(*arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def failed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The last line of what is said."""
    capsys.readouterr()
    assert main(command(*arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.splitlines()[-1].removeprefix("gm-mlx: error: ")


def arrays(folder: Path) -> dict[str, np.ndarray]:
    tensors = open_safetensors([folder / "model.safetensors"])
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def notes(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gm.json").read_text())


def answer(folder: Path) -> str:
    return gm_mlx.load(str(folder)).chat("What is this?", [picture()], max_tokens=8).text


# --- what it makes ---


def test_from_stage_to_stage(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each, what learns moves and nothing else; the last folder answers and can be converted and quantized."""
    (base / "LICENSE.txt").write_text("terms")
    folders = [base, *(tmp_path / f"stage{number}" for number in (1, 2, 3))]
    learns = {1: {"projector"}, 2: {"projector", "embeddings", "attention", "dense_ffn", "norms"}}
    for stage, (before, out) in enumerate(pairwise(folders), 1):
        report(capsys, stage, before, data, out)
        old, new = arrays(before), arrays(out)
        if stage == 3:
            break
        moved = {name for name in new if not np.array_equal(old[name], new[name])}
        assert old.keys() == new.keys()
        assert moved == {name for name in new if component_of(name) in learns[stage]}

    ffn, expert = "language_model.model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.switch_mlp.up_proj"
    assert f"{ffn}.weight" in old and f"{ffn}.weight" not in new
    kept = old.keys() & new.keys()
    assert {component_of(name) for name in new.keys() - kept} == {"experts", "routers"}
    assert all(np.array_equal(old[name], new[name]) for name in kept)
    for one in new[f"{expert}.weight"]:
        assert 0 < np.abs(one - old[f"{ffn}.weight"]).max() < 0.01
    assert ModelConfig.load(folders[3]).text_config.moe == read_recipe("llava-gm").stages[3].moe

    gm = notes(folders[3])
    assert [training["stage"] for training in (*gm["trained_before"], gm["training"])] == [1, 2, 3]
    assert gm["training"]["trains"] == ["experts", "routers"] and gm["training"]["base"] == "stage2"
    assert gm["upcycle"]["from"] == "copies of dense FFNs"
    assert (gm["template"], gm["image_mode"]) == ("gemma", "pad")
    card = (folders[3] / "README.md").read_text()
    assert "4 experts, 2 per token" in card and "Trained from `stage2`" in card
    assert "Stage 3 of the recipe LLaVA-GM; experts, routers learnt. 2 steps of 4 rows, from 12 rows" in card
    assert (folders[3] / "LICENSE.txt").read_text() == "terms"
    assert str(tmp_path) not in card + json.dumps(gm)

    assert answer(folders[3])
    for more in (["convert", str(folders[3]), "--to", "gguf", "-o"], ["quantize", str(folders[3]), "-o"]):
        assert main([*more, str(tmp_path / more[0])]) == 0, capsys.readouterr().err
    assert answer(tmp_path / "quantize")


def test_captions_leave_the_template_alone(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 1 leaves questions out, and its rows are shorter; what is written still has the template of chats."""
    captions = report(capsys, 1, base, data, tmp_path / "captions")
    chats = report(capsys, 1, base, data, tmp_path / "chats", "--template", "gemma")
    assert captions["facts"]["tokens"]["max"] < chats["facts"]["tokens"]["max"]
    assert Processor.from_folder(tmp_path / "captions").template.name == "gemma"
    assert Processor.from_folder(tmp_path / "captions").to_dict() == Processor.from_folder(base).to_dict()


def test_another_template(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, 2, base, data, tmp_path / "out", "--template", "v1")
    assert Processor.from_folder(tmp_path / "out").template.name == "v1"
    assert notes(tmp_path / "out")["template"] == "v1"
    plain = tiny_folder(tmp_path / "plain", model=tiny_model(config=DENSE), template=PLAIN)
    said = failed(capsys, 2, plain, data, tmp_path / "no")
    assert "the model's chat template is 'plain', which leaves questions out; name one with --template" in said
    report(capsys, 2, plain, data, tmp_path / "yes", "--template", "gemma")
    assert Processor.from_folder(tmp_path / "yes").template.name == "gemma"
    report(capsys, 2, plain, data, tmp_path / "captions", "--template", "plain")


def test_half_precision_stays_what_it_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights keep their bits; trained ones are rounded to what they were stored in."""
    import mlx.core as mx

    model = tiny_model(config=DENSE)
    model.set_dtype(mx.bfloat16)
    base = tiny_folder(tmp_path / "half", model=model)
    report(capsys, 3, base, data, tmp_path / "out", "--learning-rate", "0.01")
    old, new = (open_safetensors([folder / "model.safetensors"]) for folder in (base, tmp_path / "out"))
    for name, tensor in new.items():
        assert tensor.dtype == ("F32" if component_of(name) == "routers" else "BF16"), name
        if name in old:
            assert mx.array_equal(tensor.read(), old[name].read())


def test_a_sparse_model_is_trained_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = MoEConfig(num_experts=3, top_k=1, router_rank=2)
    base = tiny_folder(tmp_path / "sparse", model=tiny_model(config=tiny_config("clip", moe=moe)))
    assert main(command(3, base, data, tmp_path / "out")) == 0
    assert "note: sparse has experts already; they are trained, and no new ones are made" in capsys.readouterr().err
    assert ModelConfig.load(tmp_path / "out").text_config.moe == moe
    assert "upcycle" not in notes(tmp_path / "out")
    old, new = arrays(base), arrays(tmp_path / "out")
    moved = {name for name in new if not np.array_equal(old[name], new[name])}
    assert moved == {name for name in new if component_of(name) in ("experts", "routers")}
    said = failed(capsys, 3, base, data, tmp_path / "no", "--upcycle", "4x2")
    assert said == "--upcycle: sparse has experts already; leave it out to train those"


def test_options_win_over_the_recipe(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trains", "routers", "--trains", "projector", "--upcycle", "3x2@1", "--router-rank", "2"]
    more += ["--aux-loss-coef", "0.5", "--z-loss-coef", "0.1", "--capacity", "1", "--capacity-by", "priority"]
    more += ["--learning-rate", "0.01", "--seed", "7", "--schedule", "linear", "--accumulate", "2"]
    facts = report(capsys, 3, base, data, tmp_path / "out", *more)
    assert (facts["learning_rate"], facts["seed"], facts["schedule"]) == (0.01, 7, "linear")
    assert facts["trains"] == ["projector", "routers"]
    moe = ModelConfig.load(tmp_path / "out").text_config.moe
    assert moe == MoEConfig(3, 2, "custom", (1,), router_rank=2, aux_loss_coef=0.5)
    log = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    assert set(log[0]["load_entropy"]) == {"1"} and sum(line["dropped"]["1"] for line in log[:2]) > 0
    roomy = report(capsys, 3, base, data, tmp_path / "roomy", "--capacity", "0")
    log = [json.loads(line) for line in (tmp_path / "roomy.run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["dropped"] == {"0": 0}
    drawn = report(capsys, 3, base, data, tmp_path / "drawn", "--capacity", "0", "--second-expert", "drawn")
    assert drawn["loss"] != roomy["loss"]
    report(capsys, 3, base, data, tmp_path / "dense", "--upcycle", "none", "--trains", "all_ffn")
    assert ModelConfig.load(tmp_path / "dense").text_config.moe is None


def test_rows_at_a_time_change_nothing_but_memory(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of 4 rows in parts of 1, as the recipe has it, is a step of 4 rows at once."""
    parts = report(capsys, 2, base, data, tmp_path / "parts", "--learning-rate", "0.001")
    whole = report(capsys, 2, base, data, tmp_path / "whole", "--learning-rate", "0.001", "--accumulate", "1")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    identity = [json.loads((tmp_path / f"{name}.run" / "run.json").read_text()) for name in ("parts", "whole")]
    assert identity[0]["recipe"] == "LLaVA-GM"
    for name, array in arrays(tmp_path / "parts").items():
        np.testing.assert_allclose(array, arrays(tmp_path / "whole")[name], atol=3e-4, err_msg=name)


def test_an_adapter_in_stage_2(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: Mine\nstages:\n  2:\n    lora: {rank: 2, targets: [attention, projector]}\n    learning_rate: 1e-2\n"
    )
    facts = report(capsys, 2, base, data, tmp_path / "out", "--recipe", str(recipe))
    assert (facts["trains"], facts["base"]) == (["projector", "attention"], "start")
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (2, "start")
    assert notes(tmp_path / "out")["training"]["recipe"] == "Mine"
    assert main(["fuse", str(base), str(tmp_path / "out"), "-o", str(tmp_path / "fused")]) == 0
    assert main(command(3, tmp_path / "fused", data, tmp_path / "last")) == 0
    # The same on 4 bits, where nothing could learn whole.
    packed = tiny_folder(tmp_path / "packed", model=model_of("gemma", "q4"))
    report(capsys, 2, packed, data, tmp_path / "on-packed", "--recipe", str(recipe))
    said = failed(capsys, 2, base, data, tmp_path / "no", "--recipe", str(recipe), "--template", "v1")
    assert "an adapter is used with its model's template and images, 'gemma' and 'resize'" in said
    report(capsys, 2, base, data, tmp_path / "whole", "--recipe", str(recipe), "--trains", "decoder")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_the_same_command_goes_on(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    first = report(capsys, 3, base, data, out)
    written = (out / "gm.json").stat().st_mtime_ns
    again = report(capsys, 3, base, data, out)
    assert (again["loss"], again["steps"]) == (first["loss"], first["steps"])
    assert (out / "gm.json").stat().st_mtime_ns == written
    for option, value, key in (
        ("--capacity", "2", "capacity"),
        ("--second-expert", "drawn", "second_expert"),
        ("--upcycle", "3x2", "moe"),
        ("--trains", "all_ffn", ""),
    ):
        said = failed(capsys, 3, base, data, out, option, value)
        assert re.search(rf"out\.run.*{key}", said), said
    other = report(capsys, 3, base, data, out, "--upcycle", "3x2", "--restart", "--force")
    assert other["steps"] == 2 and ModelConfig.load(out).text_config.moe.num_experts == 3  # type: ignore[union-attr]


def test_what_is_said(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(command(3, base, data, out, "--hold-out", "3")) == 0
    said = capsys.readouterr()
    assert "9 rows with 3 images to learn from; 3 held out to measure on" in said.err
    assert f"gm-mlx chat --model {out} --image FILE" in said.err
    for component, parameters in (("experts", 4 * 3 * 64 * 128), ("routers", 4 * 64)):
        assert re.search(rf"{component} +{parameters:,} ", said.err)
    assert "2 steps of 4 rows, from 9 rows" in said.out


# --- what is refused ---


def test_a_quantized_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = tiny_folder(tmp_path / "sparse", model=model_of("gemma", "q4"))
    said = failed(capsys, 2, sparse, data, tmp_path / "out")
    assert "is quantized; train LoRA on it (gm-mlx lora), or start from the model that is not quantized" in said
    dense = tiny_model(config=DENSE)
    from gm_mlx.weights import apply_quantization

    apply_quantization(dense, {"group_size": 32, "bits": 4})
    folder = tiny_folder(tmp_path / "dense", model=dense)
    said = failed(capsys, 3, folder, data, tmp_path / "out")
    assert said == f"--upcycle: {folder} is quantized; take the model that it was made from"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "llava"], "--recipe llava: no such recipe; name one of"),
        (["--stage", "4"], "--stage 4: .*llava-gm.yaml has the stages 1, 2, 3; choose one of them"),
        (["--trains", "head"], "--trains: 'head' is not one of"),
        (["--upcycle", "4"], "--upcycle: '4': not EXPERTSxTOP_K"),
        (["--upcycle", "none"], "trains: the model has no moe; make experts with --upcycle, such as 4x2"),
        (["--router-rank", "4"], "--router-rank: 4 is not below the number of experts, 4"),
        (["--aux-loss-coef", "-1"], "--aux-loss-coef: -1.0 is not a number of 0 or more"),
        (["--capacity-by", "age"], "--capacity: .*'age'"),
        (["--second-expert", "third"], "--second-expert: 'third' is not one of largest, drawn"),
        (["--upcycle", "evf", "--second-expert", "drawn"], "second_expert: is of experts, and the model has vision"),
        (["--template", "chatml"], "--template: 'chatml' is not one of gemma, v1, plain"),
        (["--epochs", "1", "--steps", "1"], "--epochs and --steps are two ways"),
        (["--learning-rate", "-1"], "--learning-rate: -1.0 is not a number above 0"),
        (["--max-length", "100000"], "--max-length: 100000 is more than the model's context of 512"),
        (["--recipe", "eve", "--stage", "3", "--upcycle", "4x2"], "no vision FFNs; make some with --upcycle evf"),
    ],
)
def test_options_that_mean_nothing(
    more: list[str], message: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failed(capsys, 3, base, data, tmp_path / "out", *more)
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_what_stands_in_the_way(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert "exists; choose another folder" in failed(capsys, 3, base, data, tmp_path / "out")
    assert "is the source" in failed(capsys, 3, base, data, base)
    assert "no such folder" in failed(capsys, 3, tmp_path / "none", data, tmp_path / "x")
    assert "is for llama.cpp, which does not train" in failed(capsys, 3, tmp_path / "m.gguf", data, tmp_path / "x")
