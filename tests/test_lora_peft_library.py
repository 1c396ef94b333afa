"""Adapters go from peft to gm-mlx and back, and both models say the same: peft itself is the reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from checkpoints import model_config, write_hf
from checkpoints import reference as reference_of
from torch_reference import CLIP, IMAGE_TOKEN, TEXT, model_pair, relative_error

from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.lora.attach import add_lora, wrappers
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.lora.folder import load_adapter, save_adapter
from gm_mlx.model import Model
from gm_mlx.weights import load_model

CONFIG = ModelConfig(dataclasses.replace(TEXT, moe=MoEConfig()), CLIP, image_token_index=IMAGE_TOKEN)
LINEARS = r"(self_attn\.(q|k|v|o)_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj)"
EVERYWHERE = rf".*language_model\.layers\.\d+\.{LINEARS}|.*multi_modal_projector\.linear_[12]"
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 6},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2, r"experts\.1\.up_proj": 3},
        "alpha_pattern": {"down_proj": 9},
    },
}


def prompt() -> tuple[np.ndarray, np.ndarray]:
    """Ids [1, L] with an image's slots in them, and its pixels [1, H, W, 3]."""
    random = np.random.default_rng(3)
    ids = random.integers(0, IMAGE_TOKEN, (1, 12 + CONFIG.num_image_tokens))
    ids[0, 5 : 5 + CONFIG.num_image_tokens] = IMAGE_TOKEN
    return ids, random.normal(size=(1, CLIP.image_size, CLIP.image_size, 3)).astype(np.float32)


def theirs(model: Any) -> np.ndarray:
    ids, pixels = prompt()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2))
    return found.logits.numpy()


def ours(model: Model) -> mx.array:
    ids, pixels = prompt()
    embeddings = model.embed(ids, model.encode_images(mx.array(pixels)))
    return model.logits(model.hidden(embeddings, positions=model.positions(ids)))


@pytest.mark.parametrize("kind", SETTINGS)
def test_from_peft(kind: str, tmp_path: Path) -> None:
    model, reference = model_pair(CONFIG)
    plain = theirs(reference)
    wrapped = peft.get_peft_model(reference, peft.LoraConfig(target_modules=EVERYWHERE, **SETTINGS[kind]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1 / 8)
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = theirs(wrapped.eval())
    assert np.abs(wanted - plain).max() > 0.1 * np.abs(plain).max()
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(ours(model), wanted) < 1e-5


def write_adapter(model: Model, folder: Path, **settings: Any) -> None:
    """Give a model LoRA that does something, and write it as peft has it."""
    add_lora(model, LoRAConfig(rank=4, alpha=6.0, **settings))
    random = np.random.default_rng(2)
    for wrapper in wrappers(model).values():
        for low in wrapper.adapters:
            low.lora_b = mx.array(random.normal(size=low.lora_b.shape) / 8, mx.float32)
    save_adapter(model, folder, base="org/tiny", peft=True)


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA"])
def test_to_peft(kind: str, tmp_path: Path) -> None:
    model, reference = model_pair(CONFIG)
    plain = theirs(reference)
    write_adapter(model, tmp_path / "adapter", rslora=kind == "rsLoRA", dora=kind == "DoRA")
    loaded = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter")).eval()
    wanted = ours(model)
    assert np.abs(np.array(wanted) - plain).max() > 0.1 * np.abs(plain).max()
    assert relative_error(wanted, theirs(loaded)) < 1e-5


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen1_5", "stablelm", "phi"])
def test_other_decoders_to_peft(decoder: str, tmp_path: Path) -> None:
    """Dense ones of transformers, each with its own names."""
    reference = reference_of(model_config(decoder, moe=None), decoder)
    write_hf(tmp_path / "source", reference)
    assert main(["convert", str(tmp_path / "source"), "-o", str(tmp_path / "model")]) == 0
    model = load_model(tmp_path / "model")
    ids = np.random.default_rng(0).integers(4, 390, (1, 30))
    with torch.no_grad():
        plain = reference(input_ids=torch.tensor(ids)).logits
        write_adapter(model, tmp_path / "adapter", targets=("attention", "dense_ffn", "embeddings"))
        loaded = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter")).eval()
        wanted = loaded(input_ids=torch.tensor(ids)).logits
    assert (wanted - plain).abs().max() > 0.1 * plain.abs().max()
    assert relative_error(model.logits(model.hidden(model.embed(ids))), wanted) < 5e-3
