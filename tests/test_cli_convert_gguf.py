"""``gm-mlx convert --to gguf`` from the command line to files that llama.cpp runs."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model

import gm_mlx
from gm_mlx.cli.main import main
from gm_mlx.config import MoEConfig
from gm_mlx.convert.to_gguf import folder
from gm_mlx.gguf_file import read_header
from gm_mlx.llama import probe
from gm_mlx.llama.engine import LlamaCppEngine


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "source")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    code = main(["convert", *map(str, arguments), "--to", "gguf", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gm-mlx: error: ") and captured.err.count("\n") == 1
    return captured.err


def types_of(file: Path) -> dict[str, str]:
    return {name: tensor.type for name, tensor in read_header(file).tensors.items()}


def answer(model: Path) -> str:
    loaded = gm_mlx.load(str(model))
    try:
        return loaded.chat("What is this?", [picture()], max_tokens=8).text
    finally:
        loaded.close()


def test_a_model_folder_becomes_a_pair_of_files(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "LICENSE.txt").write_text("terms")
    (source / "README.md").write_text("---\nlicense: gemma\n---\n# Old\n")
    facts = run(capsys, source, "-o", tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["LICENSE.txt", "README.md", "gm.json", "mmproj.gguf", "model.gguf"]
    assert facts["bytes"] == sum((tmp_path / "out" / f"{n}.gguf").stat().st_size for n in ("model", "mmproj"))
    text, vision = (read_header(tmp_path / "out" / f"{n}.gguf").metadata for n in ("model", "mmproj"))
    assert text["gm.pair"] == vision["gm.pair"] and text["general.license"] == "gemma"
    gm = json.loads((tmp_path / "out" / "gm.json").read_text())
    assert gm["quantization"]["recipe"] == "F32" and "model.safetensors" in gm["sources"]["checkpoint"]["sha256"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: gemma" in card and "llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf" in card
    assert answer(tmp_path / "out" / "model.gguf") == answer(source)


@pytest.mark.parametrize(
    "name, experts, embedding, tower",
    [
        ("F16", "F16", "F16", "F16"),
        ("q8_0", "Q8_0", "Q8_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q8_0", "Q8_0"),
        ("q4", "Q4_K", "Q8_0", "Q8_0"),
        ("Q5_1", "Q5_1", "Q5_1", "Q8_0"),
    ],
)
def test_types(
    name: str, experts: str, embedding: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=256)
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=config))
    run(capsys, source, "-o", tmp_path / "out", "--quantize", name)
    text, vision = (types_of(tmp_path / "out" / f"{n}.gguf") for n in ("model", "mmproj"))
    assert text["blk.1.ffn_gate_exps.weight"] == experts and text["token_embd.weight"] == embedding
    assert text["blk.1.ffn_gate_inp.weight"] == "F32" and vision["v.blk.0.attn_q.weight"] == tower
    assert vision["v.patch_embd.weight"] == vision["v.position_embd.weight"] == "F32"
    assert answer(tmp_path / "out" / "model.gguf")


def test_with_an_importance_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=256)
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=config))
    matrix = tmp_path / "imatrix.gguf"
    assert "--imatrix" in refused(capsys, source, "-o", tmp_path / "o", "--to", "gguf", "--quantize", "IQ2_XS")
    assert main(["imatrix", str(source), "-o", str(matrix), "--samples", "4"]) == 0
    capsys.readouterr()
    run(capsys, source, "-o", tmp_path / "out", "--quantize", "IQ2_XS", "--imatrix", matrix)
    assert types_of(tmp_path / "out" / "model.gguf")["blk.1.ffn_gate_exps.weight"] == "IQ2_XS"
    assert read_header(tmp_path / "out" / "model.gguf").metadata["quantize.imatrix.file"] == "imatrix.gguf"


def test_a_dense_model_is_upcycled_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_folder(tmp_path / "dense", model=tiny_model(config=tiny_config(moe=None, tie_word_embeddings=True)))
    run(capsys, dense, "-o", tmp_path / "native")
    assert read_header(tmp_path / "native" / "model.gguf").metadata["general.architecture"] == "gemma"
    run(capsys, dense, "-o", tmp_path / "sparse", "--upcycle", "4x2", "--router-rank", "3")
    assert read_header(tmp_path / "sparse" / "model.gguf").metadata["gemma4.expert_used_count"] == 2
    messages = [{"role": "user", "content": "What is this?"}]
    logits = []
    for name in ("native", "sparse"):
        engine = LlamaCppEngine(tmp_path / name / "model.gguf", tmp_path / name / "mmproj.gguf")
        logits.append(engine.prompt_logits(messages, [picture()]))
        engine.close()
    assert np.abs(logits[0] - logits[1]).max() < 5e-3 * np.abs(logits[0]).max()


def test_a_quantized_folder_is_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run(capsys, "gm-tiny", "-o", tmp_path / "out")
    assert types_of(tmp_path / "out" / "model.gguf")["blk.1.ffn_gate_exps.weight"] == "F16" and not facts["notes"]
    facts = run(capsys, "gm-tiny", "-o", tmp_path / "out", "--quantize", "Q8_0", "--force")
    assert "the source is quantized" in facts["notes"][0]


@pytest.mark.parametrize("asked", [None, "cls_first", "cls_last"])
def test_clip_layout(asked: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=tiny_config("clip")))
    run(capsys, source, "-o", tmp_path / "out", *(["--clip-layout", asked] if asked else []))
    layout = read_header(tmp_path / "out" / "mmproj.gguf").metadata["gm.position_layout"]
    assert layout == (asked or probe.needed_layout())
    engine = LlamaCppEngine(tmp_path / "out" / "model.gguf", tmp_path / "out" / "mmproj.gguf")
    notices = engine.notices()
    engine.close()
    assert any("--clip-layout" in line for line in notices) == (layout != probe.needed_layout())


def test_without_llama_cpp_the_layout_is_a_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise gm_mlx.UserError("not installed")

    monkeypatch.setattr(probe, "needed_layout", missing)
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=tiny_config("clip")))
    facts = run(capsys, source, "-o", tmp_path / "out")
    assert any("--clip-layout" in line for line in facts["notes"])


def test_pooled_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    vision = replace(config.vision_config, image_size=48, patch_size=2)
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=replace(config, vision_config=vision)))
    run(capsys, source, "-o", tmp_path / "gguf", "--image-tokens", "144")
    assert main(["convert", str(source), "-o", str(tmp_path / "mlx"), "--image-tokens", "144"]) == 0
    capsys.readouterr()
    assert answer(tmp_path / "gguf" / "model.gguf") == answer(tmp_path / "mlx")
    assert main(["convert", str(source), "-o", str(tmp_path / "x"), "--to", "gguf", "--image-tokens", "64"]) == 2
    assert "mtmd pools" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "x").exists()


REFUSED: list[tuple[list[str], str]] = [
    (["--to", "gguf", "--quantize", "Q9"], "Q9"),
    (["--to", "gguf", "--quantize", "awq"], "--imatrix"),
    (["--to", "gguf", "--dtype", "float16"], "--quantize F16"),
    (["--to", "gguf", "--imatrix", "missing.gguf", "--quantize", "Q4_K_M"], "missing.gguf"),
    (["--to", "gguf", "--imatrix", "missing.gguf"], "--quantize"),
    (["--imatrix", "x.gguf"], "--to gguf"),
    (["--clip-layout", "cls_last"], "--to gguf"),
    (["--to", "gguf-lora"], "--base"),
    (["--to", "gguf-lora", "--quantize", "q4"], "--quantize"),
]


@pytest.mark.parametrize("options, reason", REFUSED)
def test_refused(
    options: list[str], reason: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refused(capsys, source, "-o", tmp_path / "out", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_llama_cpp_cannot_express(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(moe=MoEConfig(norm_topk_prob=False))
    source = tiny_folder(tmp_path / "source", model=tiny_model(config=config))
    assert "moe.norm_topk_prob" in refused(capsys, source, "-o", tmp_path / "out", "--to", "gguf")
    assert not (tmp_path / "out").exists()


def test_only_models_are_replaced(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(capsys, source, "-o", out)
    assert "exists" in refused(capsys, source, "-o", out, "--to", "gguf")
    run(capsys, source, "-o", out, "--force", "--quantize", "Q8_0")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.gguf").write_text("somebody's")
    assert "something else" in refused(capsys, source, "-o", other, "--to", "gguf", "--force")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_goes_wrong_leaves_the_old_files(
    failure: BaseException,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    run(capsys, source, "-o", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write_gguf, calls = folder.write_gguf, []

    def fail_at_the_second(path: Path, *arguments: Any) -> list[str]:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"GGUF and no more")
            raise failure
        return write_gguf(path, *arguments)

    monkeypatch.setattr(folder, "write_gguf", fail_at_the_second)
    code = main(["convert", str(source), "-o", str(out), "--to", "gguf", "--quantize", "Q8_0", "--force"])
    assert code == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert capsys.readouterr().err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
