"""From a PyTorch checkpoint to an answer, as a user types it: convert, quantize, verify, chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_layouts import LLAVA, MOE_LLAVA, llava_json, moe_llava_json, state_of
from checkpoints import model_config, reference, write, write_hf
from fixtures import picture

from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.weights import load_model


def write_layout(source: Path, layout: str, model: Any, config: ModelConfig, family: str = "gemma") -> None:
    if layout == "Hugging Face LLaVA":
        write_hf(source, model)
    elif layout == "LLaVA":
        write(source, llava_json(config, family), state_of(model, LLAVA))
    else:
        write(source, moe_llava_json(config, family), state_of(model, MOE_LLAVA))


@pytest.mark.parametrize("recipe", ["q4", "mxfp4"])
@pytest.mark.parametrize("family", ["gemma", "llama"])
@pytest.mark.parametrize("layout", ["Hugging Face LLaVA", "LLaVA", "MoE-LLaVA"])
def test_every_layout(
    tmp_path: Path, layout: str, family: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_config(family, moe=MoEConfig() if layout == "MoE-LLaVA" else None)
    model = reference(config, family)
    source, whole, small = tmp_path / "source", tmp_path / "whole", tmp_path / "small"
    write_layout(source, layout, model, config, family)
    picture().save(tmp_path / "picture.png")

    assert main(["convert", str(source), "-o", str(whole)]) == 0
    assert main(["quantize", str(whole), "-o", str(small), "--recipe", recipe]) == 0
    assert any("scales" in layer for layer in load_model(small).modules())
    assert main(["verify", str(source if layout == "Hugging Face LLaVA" else whole), str(whole)]) == 0
    capsys.readouterr()
    image = ["--image", str(tmp_path / "picture.png")]
    assert main(["chat", "--model", str(small), *image, "--prompt", "What is it?", "--max-tokens", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["image_tokens"] == config.num_image_tokens and answer["generated_tokens"] > 0


@pytest.mark.parametrize("layout", ["Hugging Face LLaVA", "LLaVA", "MoE-LLaVA"])
def test_every_layout_to_llama_cpp(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's logits come out of an unmodified llama.cpp."""
    config = model_config(moe=MoEConfig() if layout == "MoE-LLaVA" else None)
    model = reference(config)
    source, out = tmp_path / "source", tmp_path / "out"
    write_layout(source, layout, model, config)
    assert main(["convert", str(source), "-o", str(out), "--to", "gguf", "--quantize", "F32"]) == 0
    ids = np.random.default_rng(0).integers(4, 390, 40).tolist()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    engine = LlamaCppEngine(out / "model.gguf", out / "mmproj.gguf")
    given = engine.all_logits(ids)
    engine.close()
    assert np.abs(given - wanted).max() < 5e-3 * np.abs(wanted).max()
    capsys.readouterr()
    picture().save(tmp_path / "picture.png")
    image = ["--image", str(tmp_path / "picture.png")]
    assert main(["chat", "--model", str(out), *image, "--prompt", "What is it?", "--max-tokens", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["engine"] == "llama.cpp" and answer["image_tokens"] == config.num_image_tokens
