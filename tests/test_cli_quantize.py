"""``gm-mlx quantize``, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model

import gm_mlx
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.folder import read_model_folder
from gm_mlx.quant.quantize import open_source
from gm_mlx.quant.recipes import RECIPES, recipe_table
from gm_mlx.quant.sizes import file_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "float")
    (folder / "gm.json").write_text(json.dumps({"name": "x", "sha256": {"model.safetensors": "old"}}))
    (folder / "README.md").write_text("# A model\n\nIt is tiny.\n")
    (folder / "LICENSE.txt").write_text("Do what you like.\n")
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["quantize", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["quantize", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_quantized_and_asked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q4"
    assert main(["quantize", str(folder), "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"gm-mlx chat --model {out}" in captured.err
    rows = dict(line.strip().split("  ", 1) for line in captured.out.splitlines() if "  " in line.strip())
    assert {"experts", "attention", "bits per weight"} <= set(rows)

    assert ModelConfig.load(out).extra["quantization"]["group_size"] in (32, 64)
    stored = read_model_folder(out)
    assert stored["language_model.model.layers.0.mlp.switch_mlp.up_proj.weight"].dtype == "U32"
    assert stored["language_model.model.layers.0.mlp.gate.weight"].dtype == "F32"
    assert stored["language_model.model.norm.weight"].dtype == "F16"
    notes = json.loads((out / "gm.json").read_text())
    assert notes["name"] == "x"
    assert notes["sha256"]["model.safetensors"] != "old"
    assert notes["quantization"]["recipe"] == "q4"
    assert notes["quantization"]["source"] == str(folder)
    card = (out / "README.md").read_text()
    assert card.startswith("# A model\n\nIt is tiny.\n\n## Quantization\n")
    assert "| experts |" in card
    assert (out / "LICENSE.txt").read_text() == "Do what you like.\n"
    assert gm_mlx.load(str(out)).chat("what is this?", images=[picture()], max_tokens=5).stats.generated_tokens


def test_several_recipes_in_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(3).save(tmp_path / "a.png")
    lines = [json.dumps({"image": "a.png", "question": "what?", "answer": "no such answer"})] * 2
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    arguments = [str(folder), "--evaluate", "--samples", "2", "--questions", str(tmp_path / "q.jsonl"), "--limit", "1"]
    arguments += ["--recipe", "q4-all", "--recipe", "q8"]
    facts = run_json(capsys, *arguments)
    assert [found["recipe"] for found in facts["recipes"]] == ["q4-all", "q8"]
    assert facts["out"] is None
    assert facts["samples"] == 2
    assert facts["unquantized"]["exact_match"] == 0
    worse, better = facts["recipes"]
    assert worse["agreement"]["kl"] > better["agreement"]["kl"]
    assert worse["bytes"] < better["bytes"] < facts["unquantized"]["bytes"]
    assert worse["exact_match"] == 0
    for found in facts["recipes"]:
        assert sum(part["bytes"] for part in found["components"].values()) == found["bytes"]
        assert found["agreement"]["routing_layers"].keys() == {"0"}

    assert main(["quantize", *arguments]) == 0
    shown = capsys.readouterr().out
    for word in ("unquantized", "q4-all", "q8", "experts", "bits per weight", "KL divergence", "same experts", "exact"):
        assert word in shown
    assert f"{worse['agreement']['kl']:.4g}" in shown


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "mixed"])
def test_every_recipe_gives_a_model_that_answers(recipe: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / recipe
    assert main(["quantize", str(folder), "-o", str(out), "--recipe", recipe, "--samples", "4"]) == 0
    assert str(gm_mlx.load(str(out)).chat("what is this?", images=[picture()], max_tokens=8))


def test_mixed_keeps_its_budget(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    budget = file_bytes(config, recipe_table(config, "q4"))
    target = f"{budget / 1024**2:.6f}MB"
    out = tmp_path / "mixed"
    facts = run_json(capsys, str(folder), "-o", str(out), "--target-size", target, "--samples", "2", "--evaluate")
    (found,) = facts["recipes"]
    assert found["recipe"] == "mixed"
    assert found["mixed"]["measure"] == "kl"
    assert (out / "model.safetensors").stat().st_size <= budget
    assert json.loads((out / "gm.json").read_text())["quantization"]["mixed"]["bits"] == found["mixed"]["bits"]
    assert gm_mlx.load(str(out)).chat("what is this?", images=[picture()], max_tokens=5).stats.generated_tokens


def test_low_rank_routers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    facts = run_json(capsys, str(folder), "-o", str(out), "--recipe", "q8", "--router-rank", "3", "--evaluate")
    assert ModelConfig.load(out).text_config.moe == MoEConfig(router_rank=3)
    assert facts["recipes"][0]["router"]["layers"][0]["layer"] == 0
    assert facts["recipes"][0]["agreement"]["routing_set"] > 0.9
    assert gm_mlx.load(str(out)).chat("what is this?", max_tokens=5).stats.generated_tokens


def test_calibrated_low_rank_routers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(1).save(tmp_path / "a.png")
    out = tmp_path / "out"
    arguments = ["-o", str(out), "--router-rank", "1", "--calibration", str(tmp_path), "--samples", "1"]
    facts = run_json(capsys, str(folder), *arguments)
    assert facts["recipes"][0]["router"]["weighted"] is True
    assert facts["recipes"][0]["calibration"]["samples"] == 1


def test_awq_names_the_experts_that_saw_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    gate = model.layers[0].mlp.gate
    gate.weight = gate.weight * 0  # ties go to the first experts: the last two see no token
    source = tiny_folder(tmp_path / "lazy", model=model)
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--recipe", "awq", "--samples", "2"]) == 0
    assert "awq: 2 experts saw no token of the calibration data" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "gm.json").read_text())["quantization"]
    assert report["awq"]["unused_experts"] == [[0, 2], [0, 3]]
    assert report["calibration"]["tokens_per_expert"]["0"][2:] == [0, 0]


def test_quantizing_twice(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(["quantize", str(folder), "-o", str(once), "--recipe", "q8"]) == 0
    capsys.readouterr()
    assert "quantized already" in failed(capsys, str(once), "-o", str(twice))
    assert not twice.exists()
    assert main(["quantize", str(once), "-o", str(twice), "--requantize", "--evaluate", "--samples", "1"]) == 0
    card = (twice / "README.md").read_text()
    assert card.count("## Quantization") == 1
    assert "rounded weights were rounded again" in card
    assert gm_mlx.load(str(twice)).chat("what is this?", max_tokens=5).stats.generated_tokens
    source = open_source(once, requantize=True)
    assert source.dtype is None
    assert source.requantized is not None


def test_layers_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_folder(tmp_path / "odd", model=tiny_model(config=tiny_config(head_dim=40)))
    assert main(["quantize", str(source), "-o", str(tmp_path / "out")]) == 0
    assert "self_attn.o_proj stays in floats: its rows of 80 do not divide into groups of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: give -o OUT"),
        (["-o", "OUT", "--recipe", "q4", "--recipe", "q8"], "one folder holds one recipe"),
        (["-o", "OUT", "--recipe", "q5"], "recipe 'q5' is not one of q4, q8"),
        (["--evaluate", "--recipe", "q4", "--recipe", "q4"], "--recipe q4 is given twice"),
        (["-o", "OUT", "--recipe", "mixed"], "--target-size and --recipe mixed need each other"),
        (["-o", "OUT", "--recipe", "q4", "--target-size", "1GB"], "--target-size and --recipe mixed need each other"),
        (["-o", "OUT", "--target-size", "2.9 potatoes"], "--target-size: '2.9 potatoes' is not a size"),
        (["-o", "OUT", "--target-size", "10KB"], "ask for at least"),
        (["-o", "OUT", "--router-rank", "4"], "--router-rank 4: not between 1 and 3"),
        (["-o", "OUT", "--evaluate", "--samples", "0"], "--samples 0: must be at least 1"),
        (["-o", "OUT", "--evaluate", "--calibration", "nowhere"], "nowhere: no such file or folder"),
        (["-o", "OUT", "--questions", "q.jsonl"], "--questions: they are asked by --evaluate only"),
        (["--evaluate", "--questions", "q.jsonl"], "q.jsonl: cannot be read"),
        (["--evaluate", "--limit", "3"], "--limit 3: it takes so many of --questions"),
        (["-o", "OUT", "--sensitivity", "gut"], "--sensitivity: 'gut' is not one of kl, layer, auto"),
        (["-o", "nowhere/OUT"], "there is no folder"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, str(folder), *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(folder), "-o", str(out), "--recipe", "q8"]) == 0
    capsys.readouterr()
    before = (out / "model.safetensors").read_bytes()
    assert "--force" in failed(capsys, str(folder), "-o", str(out))
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["quantize", str(folder), "-o", str(out), "--force"]) == 0
    assert (out / "model.safetensors").read_bytes() != before
    capsys.readouterr()
    assert "source" in failed(capsys, str(folder), "-o", str(folder), "--force")
