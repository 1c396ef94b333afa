"""Eve as a user types it: convert, quantize, verify, chat, fine-tune, fuse; and vision FFNs for other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from eve_models import CONFIG, DENSE, write_eve
from eve_reference import eve
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from training_data import images_in, llava, write_lines

from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig
from gm_mlx.presets import EVF
from gm_mlx.weights import load_model, quantized_layers

CHAT = ("--prompt", "What is it?", "--max-tokens", "5", "--json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Eve."""
    root = tmp_path_factory.mktemp("eve")
    write_eve(root / "source", eve(CONFIG))
    assert main(["convert", str(root / "source"), "-o", str(root / "whole")]) == 0
    return root / "whole"


def chat(folder: Path, capsys: pytest.CaptureFixture[str], image: Path | None = None, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    seen = ["--image", str(image)] if image else []
    assert main(["chat", "--model", str(folder), *seen, *CHAT, *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_converted_model(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ModelConfig.load(whole) == CONFIG
    picture().save(tmp_path / "picture.png")
    assert chat(whole, capsys, tmp_path / "picture.png")["image_tokens"] == 4
    assert chat(whole, capsys)["image_tokens"] == 0
    assert main(["info", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "4 layers of width 64, 2 with a language FFN and a vision FFN, 1 per token; 4 tokens per image" in said
    assert "2 of them with a language FFN and a vision FFN" in (whole / "README.md").read_text()
    assert main(["verify", str(whole), str(whole), "--max-tokens", "3"]) == 0


@pytest.mark.parametrize(
    "recipe",
    [["q4"], ["q8"], ["q4-all"], ["mxfp4"], ["awq"], ["mixed", "--target-size", "1MB"], ["q4", "--router-rank", "1"]],
    ids=" ".join,
)
def test_every_recipe(whole: Path, tmp_path: Path, recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    samples = ["--samples", "2"]
    assert main(["quantize", str(whole), "-o", str(small), "--recipe", *recipe, *samples, "--evaluate"]) == 0
    layers = quantized_layers(load_model(small))
    for part in ("language_ffn.gate_proj2", "vision_ffn.down_proj"):
        assert f"language_model.model.layers.0.mlp.{part}" in layers
    assert not any("depthwise" in path or path.endswith(".gate") for path in layers)
    picture().save(tmp_path / "picture.png")
    assert chat(small, capsys, tmp_path / "picture.png")["generated_tokens"] > 0


def test_what_awq_leaves_alone_is_said(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "awq"
    assert main(["quantize", str(whole), "-o", str(out), "--recipe", "awq", "--samples", "2"]) == 0
    steps = json.loads((out / "gm.json").read_text())["quantization"]
    assert steps["awq"]["notes"] == ["layers [0, 1, 2] are not scaled: they have second gates or vision networks"]
    assert {scaling["layer"] for scaling in steps["awq"]["scalings"]} == {3}
    counts = steps["calibration"]["tokens_per_expert"]
    assert counts.keys() == {"0", "2"} and all(
        sum(tokens) <= steps["calibration"]["tokens"] for tokens in counts.values()
    )


def test_an_adapter(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on pictures and on words alone, on a quantized model; used beside it and merged into it."""
    images_in(tmp_path / "photos", 4)
    records = [llava("<image>what is this?", "a dog" if n % 2 else "the cat", image=f"{n % 4}.png") for n in range(8)]
    records += [llava("who are you?", "a dog") for _ in range(4)]
    data = write_lines(tmp_path / "photos" / "data.jsonl", records)
    base, out = tmp_path / "q4", tmp_path / "adapter"
    assert main(["quantize", str(whole), "-o", str(base), "--recipe", "q4"]) == 0
    steps = ["--steps", "3", "--batch-size", "4", "--workers", "0", "--learning-rate", "0.01"]
    assert main(["lora", "--model", str(base), "--data", str(data), "-o", str(out), *steps, "--router"]) == 0
    names = mx.load(str(out / "adapter_model.safetensors")).keys()
    for path in ("mlp.language_ffn.gate_proj2", "mlp.vision_ffn.up_proj", "mlp.gate", "self_attn.q_proj"):
        assert any(f"layers.0.{path}." in name for name in names), path
    assert any("layers.3.attn_linear.linear_2." in name for name in names)
    assert any("multi_modal_projector.blocks.0.pointwise." in name for name in names)
    picture().save(tmp_path / "picture.png")
    beside = chat(base, capsys, tmp_path / "picture.png", "--adapter", str(out))
    fused = tmp_path / "fused"
    assert main(["fuse", str(base), str(out), "-o", str(fused), "--dequantize"]) == 0
    assert chat(fused, capsys, tmp_path / "picture.png")["answer"] == beside["answer"]


def test_llama_cpp_has_no_such_decoder(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(whole), "-o", str(tmp_path / "out"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written as GGUF" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["series_layers", "shortcut_size", "moe.kind"])
def test_each_of_its_parts_is_refused_by_name(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Gemma with one of them, which llama.cpp would otherwise run."""
    changes: dict[str, Any] = {"moe": None, key: 1} if "." not in key else {"moe": EVF}
    folder = tiny_folder(tmp_path / "model", model=tiny_model(config=tiny_config(**changes)))
    assert main(["convert", str(folder), "-o", str(tmp_path / "out"), "--to", "gguf"]) == 2
    assert f"text_config.{key}: " in capsys.readouterr().err


# Vision FFNs for models that have none -------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "layers"), [("evf", [0, 2]), ("evf@second_half", [2, 3]), ("EVF@1,3", [1, 3])])
def test_upcycling(option: str, layers: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The language FFN is the dense one, the vision FFN its copy, and words alone get the same answer."""
    source, dense, out = tmp_path / "source", tmp_path / "dense", tmp_path / "out"
    write_eve(source, eve(DENSE))
    assert main(["convert", str(source), "-o", str(dense)]) == 0
    assert main(["convert", str(source), "-o", str(out), "--upcycle", option]) == 0
    config = ModelConfig.load(out)
    assert config.text_config.sparse_layers == layers
    assert replace(config, text_config=replace(config.text_config, moe=None)) == ModelConfig.load(dense)
    assert config.text_config.moe is not None
    assert replace(config.text_config.moe, mode="sparse", layers_idx=()) == EVF
    old, new = load_model(dense), load_model(out)
    for layer in layers:
        copied = new.layers[layer].mlp
        for name in old.layers[layer].mlp.children():
            for network in (copied.language_ffn, copied.vision_ffn):
                assert mx.array_equal(network[name].weight, old.layers[layer].mlp[name].weight)
        assert np.abs(np.array(copied.gate.weight)).max() <= 64**-0.5
    ids = mx.array(np.random.default_rng(0).integers(3, 300, (1, 20)))
    assert mx.array_equal(new(ids), old(ids))
    assert chat(out, capsys)["answer"] == chat(dense, capsys)["answer"]


def test_any_decoder_can_have_vision_ffns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_folder(tmp_path / "gemma", model=tiny_model(config=tiny_config(moe=None)))
    out = tmp_path / "out"
    assert main(["convert", str(dense), "-o", str(out), "--upcycle", "evf", "--router-rank", "1"]) == 0
    moe = ModelConfig.load(out).text_config.moe
    assert moe is not None and (moe.kind, moe.router_rank) == ("evf", 1)
    picture().save(tmp_path / "picture.png")
    assert chat(out, capsys, tmp_path / "picture.png")["generated_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upcycle", "evf", "--upcycle-split"], "--upcycle-split: a vision FFN is a copy"),
        (["--upcycle", "evf@9"], "--upcycle: layers [9] are not all among"),
        (["--upcycle", "4x2"], "series_layers: experts have one gate"),
    ],
)
def test_what_cannot_be_upcycled(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_eve(tmp_path / "source", eve(DENSE))
    assert main(["convert", str(tmp_path / "source"), "-o", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_numbers_of_image_tokens(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tokens in ("1", "4", "16"):
        assert main(["convert", str(whole), "-o", str(tmp_path / "out"), "--image-tokens", tokens]) == 2
        assert "its projector 'ldpnet' makes 4 tokens; leave it out" in capsys.readouterr().err


def test_the_preset_is_measured_on_mlx_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A gigabyte is not written before it is said that the next form is impossible."""
    assert main(["bench", "--preset", "eve-1.8b"]) == 2
    said = capsys.readouterr().err
    assert "cannot be written as GGUF" in said and "name recipes only, such as --quantize q4" in said
