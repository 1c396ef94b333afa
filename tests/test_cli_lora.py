"""``gm-mlx lora`` as a user types it, on tiny models: from data of each format to an adapter that works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import picture, tiny_folder
from lora_models import error, logits, model_of
from safetensors import safe_open
from training_data import data_url, images_in, llava, write_lines

from gm_mlx.cli.main import main
from gm_mlx.errors import UserError
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.lora.folder import load_adapter
from gm_mlx.model import Model
from gm_mlx.train.events import Event
from gm_mlx.weights import load_model

STEPS = ("--steps", "4", "--batch-size", "4", "--workers", "0", "--learning-rate", "0.01")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "tiny", model=model_of("gemma", "q4"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images_in(tmp_path / "photos", 4)
    records = [llava("<image>what is this?", "a dog" if n % 2 else "the cat", image=f"{n % 4}.png") for n in range(12)]
    return write_lines(tmp_path / "photos" / "data.jsonl", records)


@pytest.fixture(autouse=True)
def without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than a tiny run."""
    if "curves" not in request.function.__name__:
        monkeypatch.setattr("gm_mlx.cli.training._draw", lambda run: None)


def run(base: Path, data: Path, out: Path, *more: str) -> int:
    return main(["lora", "--model", str(base), "--data", str(data), "-o", str(out), *STEPS, *more])


def report(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The last line of what is said; there is no other, unless rows are listed before it."""
    capsys.readouterr()
    assert main(["lora", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


# --- what it makes ---


def test_an_adapter_that_works(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds what was trained; ``chat --adapter`` and ``fuse`` take it."""
    models: list[Model] = []
    monkeypatch.setattr(
        "gm_mlx.weights.load_model",
        lambda *given, load=load_model, **more: models.append(load(*given, **more)) or models[-1],
    )
    out = tmp_path / "mine"
    facts = report(capsys, base, data, out)
    loaded = load_model(base)
    plain = logits(loaded)
    load_adapter(loaded, out)
    assert error(logits(loaded), logits(models[0])) <= 1e-6
    assert error(logits(loaded), plain) > 1e-3
    assert facts["steps"] == 4 and facts["loss"] < facts["first_loss"]
    assert (facts["adapter"], facts["model"], facts["run"]) == (str(out), "tiny", str(tmp_path / "mine.run"))
    assert facts["parameters"] < facts["model_parameters"] and facts["seconds"] > 0

    picture().save(tmp_path / "a.png")
    ask = ["--image", str(tmp_path / "a.png"), "--prompt", "what is this?", "--max-tokens", "8", "--json"]
    assert main(["chat", "--model", str(base), "--adapter", str(out), *ask]) == 0
    beside = json.loads(capsys.readouterr().out)["answer"]
    assert main(["fuse", str(base), str(out), "-o", str(tmp_path / "fused"), "--dequantize"]) == 0
    capsys.readouterr()
    assert main(["chat", "--model", str(tmp_path / "fused"), *ask]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == beside


def test_what_is_said(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    assert run(base, data, out, "--hold-out", "3", "--validate-every", "2") == 0
    said = capsys.readouterr()
    for text in (
        "9 rows with 3 images to learn from; 3 held out to measure on",
        f"gm-mlx chat --model {base} --adapter {out} --image FILE",
        f"gm-mlx fuse {base} {out} -o {out}-fused",
        f"for llama.cpp, once it is merged: gm-mlx convert {out}-fused --to gguf",  # the projector is in it
    ):
        assert text in said.err, text
    row = next(line for line in said.err.splitlines() if line.strip().startswith("experts"))
    assert row.split()[1:3] == ["12", "8"]  # one sparse layer with 4 experts of 3 matrices
    assert "4 steps of 4 rows, from 9 rows with 3 images" in said.out and "On 3 rows held out" in said.out
    assert {"run.json", "log.jsonl"} <= {path.name for path in (tmp_path / "mine.run").iterdir()}
    lines = [json.loads(line) for line in (tmp_path / "mine.run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4]
    notes = json.loads((out / "gm.json").read_text())
    assert notes["training"]["held_out"] == 3 and notes["base"]["name"] == "tiny"
    card = (out / "README.md").read_text()
    assert "## Training\n\n4 steps of 4 rows" in card and "gm-mlx chat --model tiny --adapter mine" in card
    assert str(tmp_path) not in card + (out / "gm.json").read_text()


def test_curves(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are drawn where matplotlib is, and are not worth an error."""
    assert report(capsys, base, data, tmp_path / "a")["curves"] == str(tmp_path / "a.run" / "curves.png")
    assert (tmp_path / "a.run" / "curves.png").read_bytes().startswith(b"\x89PNG")

    def full(folder: Path) -> Path:
        raise UserError("the disk is full")

    monkeypatch.setattr("gm_mlx.train.curves.draw_curves", full)
    assert run(base, data, tmp_path / "b") == 0
    assert "note: the disk is full" in capsys.readouterr().err and (tmp_path / "b").is_dir()
    monkeypatch.setattr("gm_mlx.cli.training.find_spec", lambda name: None)
    assert report(capsys, base, data, tmp_path / "c")["curves"] is None


def test_for_llama_cpp(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    assert run(base, data, out, "--target", "attention", "--target", "experts") == 0
    assert f"gm-mlx convert {out} --to gguf-lora --base {base} -o {out}.gguf" in capsys.readouterr().err
    assert main(["convert", str(out), "--to", "gguf-lora", "--base", str(base), "-o", f"{out}.gguf"]) == 0


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("table", [None, "q4", "mxfp4"])
@pytest.mark.parametrize("config", ["phi", "low-rank router"])
def test_every_kind_of_base(
    config: str, table: str | None, dora: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path / "base", model=model_of(config, table))
    more = ["--router", "--tower", "--rslora", "--dropout", "0.1", *(["--dora"] if dora else [])]
    facts = report(capsys, base, data, tmp_path / "mine", "--rank", "3", "--alpha", "5", *more)
    adapter = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["use_rslora"]) == (3, 5, True)
    assert (adapter["use_dora"], adapter["lora_dropout"]) == (dora, 0.1)
    components = {"tower", "projector", "attention", "dense_ffn", "experts", "routers"}
    table_of = (tmp_path / "mine" / "README.md").read_text()
    assert all(f"| {component} |" in table_of for component in components)
    assert facts["loss"] < facts["first_loss"]
    load_adapter(load_model(base), tmp_path / "mine")


@pytest.mark.parametrize("peft", [False, True])
def test_names_of_peft(peft: bool, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """peft has no stacks: with --peft, each tensor is a factor of one matrix, under the name of its module."""
    out = tmp_path / "mine"
    report(capsys, base, data, out, *(["--peft"] if peft else []))
    with safe_open(out / "adapter_model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", name) for name in shapes)
    assert all(len(shape) == 2 for shape in shapes.values()) is peft
    if peft:
        layer = "base_model.model.model.language_model.layers.0.mlp.experts"
        assert shapes[f"{layer}.3.down_proj.lora_B.weight"] == [64, 8]
    load_adapter(load_model(base), out)


def test_an_adapter_is_trained_on(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report(capsys, base, data, tmp_path / "first", "--rank", "3", "--target", "attention")
    second = report(capsys, base, data, tmp_path / "second", "--init", str(tmp_path / "first"))
    assert second["parameters"] == first["parameters"]
    assert second["first_loss"] < first["first_loss"]
    text = failed(
        capsys, "--model", base, "--data", data, "-o", tmp_path / "x", "--init", tmp_path / "first", "--rank", "4"
    )
    assert "--rank: the adapter of --init has its own; leave one of the two out" in text


# --- data ---


def rows(kind: str, folder: Path) -> tuple[Path, list[str]]:
    """Data of a kind with 8 rows and 4 images, and the options that it needs."""
    names = [Path(name).name for name in images_in(folder, 4)]
    if kind == "llava list":
        records = [llava("<image>what?", "a dog", image=names[n % 4]) for n in range(8)]
        (folder / "data.json").write_text(json.dumps(records))
        return folder, []
    if kind == "messages":
        records = [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(n % 4)}}]},
                    {"role": "assistant", "content": "a dog"},
                ]
            }
            for n in range(8)
        ]
        return write_lines(folder / "data.jsonl", records), ["--format", "messages"]
    lines = ["file,question,answer", *(f"{names[n % 4]},what is {n}?,a dog" for n in range(8))]
    (folder / "x").mkdir()
    (folder / "x" / "data.csv").write_text("\n".join(lines))
    return folder / "x" / "data.csv", ["--columns", "image=file", "--images", str(folder)]


@pytest.mark.parametrize("kind", ["llava list", "messages", "pairs"])
def test_data_of_each_kind(kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, options = rows(kind, tmp_path / "data")
    facts = report(capsys, base, place, tmp_path / "mine", *options)
    assert (facts["rows"], facts["images"], facts["held_out"]) == (8, 4, 0)


def test_several_sources_and_validation_data(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, _ = rows("llava list", tmp_path / "more")
    apart, _ = rows("messages", tmp_path / "apart")
    facts = report(
        capsys, base, data, tmp_path / "mine", "--data", str(more), "--validation", str(apart), "--validate-every", "0"
    )
    assert (facts["rows"], facts["held_out"]) == (20, 8)
    assert facts["exact_match"] is not None


def test_bad_rows_are_listed_or_left_out(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images_in(tmp_path, 1)
    good = llava("<image>what?", "a dog", image="0.png")
    file = write_lines(tmp_path / "d.jsonl", [good, "{", good, llava("<image>what?", "a dog", image="9.png"), good])
    assert run(base, file, tmp_path / "mine") == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == 3
    assert lines[0].startswith(f"{file}: line 2: ") and lines[1].startswith(f"{file}: line 4: ")
    assert "2 of 5 rows cannot be learnt from" in lines[2] and "--skip-bad" in lines[2]
    assert not list(tmp_path.glob("mine*"))
    assert run(base, file, tmp_path / "mine", "--skip-bad", "--json") == 0
    said = capsys.readouterr()
    assert "note: 2 rows are left out" in said.err and f"{file}: line 4: " in said.err
    assert json.loads(said.out)["rows"] == 3


# --- a run that is stopped, goes on, is over ---


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    """Ctrl-C when so many steps are done, told by what is watched."""

    def stop(self: Any, event: Event) -> None:
        if (event.kind, event.step) == ("step", step):
            raise KeyboardInterrupt

    monkeypatch.setattr("gm_mlx.cli.training_display.TrainingDisplay.__call__", stop)


def arrays(adapter: Path) -> dict[str, np.ndarray]:
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_stopped_and_resumed(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report(capsys, base, data, tmp_path / "whole")
    out = tmp_path / "mine"
    stop_at(monkeypatch, 2)
    assert run(base, data, out) == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"saved step 2 of 4 in {out}.run; run the same command again to go on"
    assert not out.exists()
    stop_at(monkeypatch, None)
    facts = report(capsys, base, data, out)
    assert facts["steps"] == 4
    for name, array in arrays(tmp_path / "whole").items():
        np.testing.assert_array_equal(array, arrays(out)[name])


def test_a_run_that_is_over(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command says so; what was lost it writes again; another command is refused, or begins anew."""
    out = tmp_path / "mine"
    report(capsys, base, data, out)
    first = arrays(out)
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert run(base, data, out) == 0
    assert f"{out} is there already" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    report(capsys, base, data, out)
    assert all((arrays(out)[name] == array).all() for name, array in first.items())

    given = ("--model", base, "--data", data, "-o", out, *STEPS, "--rank", "4")
    text = failed(capsys, *given)
    assert "rank" in text and "4" in text and "8" in text and "--restart" in text
    assert "exists; choose another folder, or replace it with --force" in failed(capsys, *given, "--restart")
    assert main(["lora", *map(str, given), "--restart", "--force"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_another_base_or_data_is_another_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(capsys, base, data, tmp_path / "mine", "--run", str(tmp_path / "run"))
    other = tiny_folder(tmp_path / "other", model=model_of("gemma", "q4", seed=1))
    options = ("-o", tmp_path / "new", "--run", tmp_path / "run", *STEPS)
    assert "model" in failed(capsys, "--model", other, "--data", data, *options)
    write_lines(data, [llava("what?", "a dog")] * 3)
    assert "data" in failed(capsys, "--model", base, "--data", data, *options)
    assert not (tmp_path / "new").exists()


# --- what is refused ---

WRONG = {
    "--rank 0": "'--rank'",
    "--alpha 0": "--alpha: 0.0 is not a number above 0",
    "--alpha nan": "--alpha: nan is not a number above 0",
    "--dropout 1": "--dropout: 1.0 is not between 0 and 1",
    "--target [": "--target '[': not a pattern",
    "--learning-rate 0": "--learning-rate: 0.0 is not a number above 0",
    "--learning-rate nan": "--learning-rate: nan",
    "--schedule cubic": "--schedule: 'cubic' is not one of",
    "--warmup 2": "--warmup: 2.0 is not a share",
    "--weight-decay -1": "--weight-decay: -1.0",
    "--clip -1": "--clip: -1.0",
    "--precision int8": "--precision: 'int8' is not one of",
    "--epochs 0": "--epochs: 0.0 is not a number above 0",
    "--epochs inf": "--epochs: inf",
    "--epochs 1 --steps 2": "--epochs and --steps are two ways",
    "--steps 0": "'--steps'",
    "--batch-size 0": "'--batch-size'",
    "--accumulate 0": "'--accumulate'",
    "--seed -1": "'--seed'",
    "--workers -1": "'--workers'",
    "--keep 0": "'--keep'",
    "--max-length 0": "'--max-length'",
    "--max-length 100000": "--max-length: 100000 is more than the model's context of 512",
    "--hold-out 1.5": "--hold-out: '1.5' is neither a share below 1 nor a number of rows",
    "--hold-out nan": "--hold-out: 'nan'",
    "--hold-out -1": "--hold-out: '-1'",
    "--hold-out 0.1 --validation x": "give one of them",
    "--hold-out 12": "12 of 12 rows cannot be held out",
    "--format yaml": "--format: 'yaml' is unknown; known are llava, messages, texts, pairs",
    "--columns image": "--columns: 'image' is not KEY=NAME",
    "--columns picture=x": "--columns: 'picture=x' is not KEY=NAME with a key of image, question, answer",
    "--patience 2 --validate-every 0": "--patience: counts validations",
    "--report-to mlflow": "--report-to: 'mlflow' is unknown; known are tensorboard and wandb",
    "--target nothing": "target 'nothing': the model has nothing of that name",
    "--dora --target embeddings": "dora: has no form for token embeddings",
    "--init nowhere": "nowhere: no such folder; name an adapter's folder",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(
    options: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options.split()
    steps = [] if {"--epochs", "--steps"} & set(given) else ["--steps", "1"]
    capsys.readouterr()
    assert main(["lora", "-m", str(base), "--data", str(data), "-o", str(tmp_path / "mine"), *steps, *given]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert WRONG[options] in said.err
    assert not list(tmp_path.glob("mine*"))


def test_wrong_models_and_places(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "gguf", tmp_path / "gguf" / "model.gguf", "gm-tiny-gguf.gguf"):
        text = failed(capsys, "-m", model, "--data", data, "-o", tmp_path / "mine")
        assert "is for llama.cpp, which does not train; name the model folder" in text
    (tmp_path / "mine").mkdir()
    assert "exists; choose another" in failed(capsys, "-m", base, "--data", data, "-o", tmp_path / "mine")
    assert "is the source" in failed(capsys, "-m", base, "--data", data, "-o", base, "--force")
    assert "no such file or folder" in failed(capsys, "-m", base, "--data", "no.jsonl", "-o", tmp_path / "new")
    assert "cannot lie in" in failed(
        capsys, "-m", base, "--data", data, "-o", tmp_path / "new", "--run", tmp_path / "new" / "run"
    )
    assert "Missing option '--data'" in failed(capsys, "-m", base, "-o", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf", "mine", "photos", "tiny"]


def test_defaults_are_lora_configs() -> None:
    from gm_mlx.cli.lora import RANK

    assert (LoRAConfig().rank, LoRAConfig().alpha) == (RANK, 2.0 * RANK)
