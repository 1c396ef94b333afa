"""Tiny models with LoRA that does something, for tests that need one."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import mlx.core as mx
import numpy as np
from fixtures import IMAGE_TOKEN, tiny_config, tiny_model

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.lora.attach import add_lora, wrappers
from gm_mlx.lora.config import LoRAConfig
from gm_mlx.model import Model
from gm_mlx.weights import apply_quantization

EVERYTHING = LoRAConfig(
    rank=4,
    alpha=6.0,
    targets=("attention", "dense_ffn", "experts", "projector", "embeddings"),
    router=True,
    tower=True,
    rank_pattern={"switch_mlp.up_proj": 3, "layers.1.self_attn.q_proj": 2},
    alpha_pattern={"down_proj": 9.0},
)
# Phi's networks have other names and no gate.
EVERYTHING_PHI = dataclasses.replace(EVERYTHING, rank_pattern={"switch_mlp.fc1": 3}, alpha_pattern={"fc2": 9.0})
WITHOUT_EMBEDDINGS = ("attention", "dense_ffn", "experts", "projector")

# Models with a dense and a sparse layer: gated and with SiLU, biases and no gate, a router of a low rank.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "phi": {"gated": False, "attention_bias": "all", "norm": "layer", "norm_plus_one": False},
    "low-rank router": {"moe": MoEConfig(router_rank=2)},
}
TABLES: dict[str, dict[str, Any]] = {
    "q4": {"group_size": 32, "bits": 4},
    "mixed": {
        "group_size": 32,
        "bits": 4,
        "language_model.model.embed_tokens": {"group_size": 32, "bits": 8},
        "language_model.model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 6},
        "multi_modal_projector.linear_1": False,
        "multi_modal_projector.linear_2": False,
    },
    "3 bits": {"group_size": 32, "bits": 3},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def everything(config: str, dora: bool = False) -> LoRAConfig:
    """LoRA wherever one of the ``CONFIGS`` can have it."""
    lora = EVERYTHING_PHI if config == "phi" else EVERYTHING
    return dataclasses.replace(lora, dora=True, targets=WITHOUT_EMBEDDINGS) if dora else lora


def model_of(config: str = "gemma", table: str | None = None, seed: int = 0) -> Model:
    """A tiny model, quantized by a table or not."""
    model = tiny_model(seed, tiny_config(**CONFIGS[config]))
    if table is not None:
        apply_quantization(model, TABLES[table])
    return model


def trained(model: Model, config: LoRAConfig = EVERYTHING, seed: int = 0, adapter: str = "default") -> Model:
    """The model with an adapter whose B, and whose lengths with DoRA, are no longer what they began with."""
    add_lora(model, config, seed, adapter)
    for path, wrapper in wrappers(model).items():
        for low in wrapper.adapters:
            if low.adapter != adapter:
                continue
            random = np.random.default_rng([seed, zlib.crc32(path.encode())])
            low.lora_b = mx.array(random.normal(size=low.lora_b.shape) / 8, mx.float32)
            if "magnitude" in low:
                low.magnitude = low.magnitude * mx.array(random.uniform(0.7, 1.4, low.magnitude.shape), mx.float32)
    model.eval()
    return model


def logits(model: Model, length: int = 40) -> np.ndarray:
    """Logits of text around an image; of 40 tokens, experts are sorted."""
    count = model.config.num_image_tokens
    ids = np.random.default_rng(3).integers(4, 300, (1, length))
    ids[0, 2 : 2 + count] = IMAGE_TOKEN
    size = model.config.vision_config.image_size
    pixels = mx.array(np.random.default_rng(4).normal(size=(1, size, size, 3)), mx.float32)
    embeddings = model.embed(ids, model.encode_images(pixels))
    return np.array(model.logits(model.hidden(embeddings)).astype(mx.float32))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def config_of(name: str = "gemma") -> ModelConfig:
    return tiny_config(**CONFIGS[name])
