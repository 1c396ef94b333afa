"""Decoders of all families as GGUF, in an unmodified llama.cpp: against float64, and against our own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy_families
import pytest
import raw_llama
from fixtures import tiny_config, tiny_model
from gguf_files import as_tensors, tiny_processor

from gm_mlx.config import ModelConfig, MoEConfig, TextConfig
from gm_mlx.convert.to_gguf.folder import gguf_pair
from gm_mlx.convert.to_gguf.text import find_architecture
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.weights import named_arrays

LLAMA: dict[str, Any] = {"norm_plus_one": False, "scale_embeddings": False, "hidden_act": "silu"}
QWEN: dict[str, Any] = {**LLAMA, "attention_bias": "qkv"}
STABLELM: dict[str, Any] = {**QWEN, "norm": "layer", "partial_rotary_factor": 0.25}
PHI2: dict[str, Any] = {
    **LLAMA,
    "norm": "layer",
    "attention_bias": "all",
    "partial_rotary_factor": 0.5,
    "parallel_block": True,
    "gated": False,
    "hidden_act": "gelu_pytorch_tanh",
}
# The architecture that each must become, dense and with experts.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (LLAMA, False),
    "qwen2": (QWEN, False),
    "stablelm": (STABLELM, False),
    "phi2": (PHI2, False),
    "step35": (LLAMA, True),
    "step35 with biases": (QWEN, True),
    "phimoe": (STABLELM, True),
}
HEADS = [(4, 1), (4, 2), (4, 4), (2, 2), (8, 2), (6, 3)]  # multi-query, grouped and one for each
MODES: list[dict[str, Any]] = [
    {"mode": "sparse"},
    {"mode": "dense"},
    {"mode": "first_half"},
    {"mode": "second_half"},
    {"mode": "custom", "layers_idx": (1,)},
]
PER_FAMILY = 12


def random_config(family: str, seed: int) -> ModelConfig:
    """Layers 2 to 5, heads of all kinds of sharing, 2 to 8 experts of which 1 to 3 are at work."""
    values, sparse = FAMILIES[family]
    random = np.random.default_rng([seed, len(family)])
    heads, kv_heads = HEADS[seed % len(HEADS)]
    dim, experts = int(random.choice([32, 64])), int(random.integers(2, 9))
    moe = MoEConfig(
        num_experts=experts,
        top_k=1 + seed % min(3, experts),
        router_rank=int(random.integers(0, experts)),
        norm_topk_prob=bool(seed % 4) or family == "phimoe",
        expert_size=int(random.choice([0, 96])) if family != "phimoe" else 0,
        **MODES[seed % len(MODES)],
    )
    free = family.startswith(("llama", "step35"))  # the others want heads that fill the stream
    return tiny_config(
        moe=moe if sparse else None,
        hidden_size=int(random.choice([64, 128, 256])) if free else heads * dim,
        intermediate_size=int(random.choice([128, 256])),
        num_hidden_layers=int(random.integers(2, 6)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=1024,
        rope_theta=float(random.choice([1e4, 1e6])),
        rms_norm_eps=float(random.choice([1e-6, 1e-5])),
        tie_word_embeddings=not seed % 5,
        **values,
    )


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by name: norms around one, routers with logits of about one, biases that matter."""
    weights = {name: np.array(array) for name, array in named_arrays(tiny_model(seed, config)).items()}
    for name, array in weights.items():
        random = np.random.default_rng([seed, len(name)])
        if ".gate." in name:  # weight [E, D], u [D, r] or v [r, E]
            inputs = array.shape[1 if name.endswith("weight") else 0]
            array[:] = random.uniform(-1, 1, array.shape) * inputs**-0.5
        elif "norm" in name and name.endswith("weight"):
            array += 1
        elif "embed_tokens" in name:
            array += 0.05  # a mean that is not zero
    return weights


def write(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray], file_type: str = "F32") -> Path:
    pair = gguf_pair(config, as_tensors(weights), tiny_processor(config, folder), name="tiny")
    path = folder / "model.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, pair.text, find_target(file_type, {}))
    return path


def prompt(text: TextConfig, seed: int, length: int = 90) -> list[list[int] | np.ndarray]:
    """Text around 16 image features, which have a mean as an image's own have."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 390, length).tolist()
    features = (random.normal(size=(16, text.hidden_size)) + 0.3).astype(np.float32)
    return [ids[:10], features, ids[26:]]


def reference(text: TextConfig, weights: dict[str, np.ndarray], parts: list[list[int] | np.ndarray]) -> np.ndarray:
    return numpy_families.logits(text, weights, np.concatenate([embedded(text, weights, part) for part in parts]))


def embedded(text: TextConfig, weights: dict[str, np.ndarray], part: list[int] | np.ndarray) -> np.ndarray:
    if isinstance(part, np.ndarray):
        return part.astype(np.float64)
    return np.stack([numpy_families.token_embedding(text, weights, token) for token in part])


def entering(text: TextConfig, parts: list[list[int] | np.ndarray]) -> list[list[int] | np.ndarray]:
    """The parts as the file's projector gives them: without their mean, where the stream must have none."""
    if not find_architecture(text).centred:
        return parts
    return [part - part.mean(-1, keepdims=True) if isinstance(part, np.ndarray) else part for part in parts]


def errors(measured: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Errors of logits by position, relative to the largest logit."""
    return np.abs(measured - expected).max(-1) / np.abs(expected).max()


@pytest.mark.parametrize("seed", range(PER_FAMILY))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, seed: int, tmp_path: Path) -> None:
    config = random_config(family, seed)
    text, weights = config.text_config, weights_of(config, seed)
    assert find_architecture(text).name == family.split()[0]
    parts = prompt(text, seed)
    expected = reference(text, weights, parts)
    measured = raw_llama.logits(write(tmp_path, config, weights), entering(text, parts))
    found = errors(measured, expected)
    print(f"{family} {seed}: median {np.median(found):.1e}, worst {found.max():.1e}")
    assert np.median(found) < 2e-3
    assert (measured.argmax(-1) != expected.argmax(-1)).mean() <= 0.05
