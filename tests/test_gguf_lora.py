"""LoRA adapters in an unmodified llama.cpp: base and adapter together, against float64 with the adapter merged."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_llama
from fixtures import tiny_config
from gguf_files import as_tensors
from lora_adapters import IDS, PARTS, PREFIXES, Adapter, draw
from test_gguf_text import Error, error, random_config, reference, weights_of, write

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf import lora_factors
from gm_mlx.convert.to_gguf.lora import convert_adapter
from gm_mlx.convert.to_gguf.lora_factors import lora_targets
from gm_mlx.convert.to_gguf.text import text_model


def errors(
    tmp_path: Path, config: ModelConfig, weights: dict[str, np.ndarray], *adapters: Adapter, power: float = 1.0
) -> tuple[Error, Error, Error]:
    """Against the merged weights in float64: base and adapters, a file of the merged weights, and the base alone."""
    base = write(tmp_path / "base", config, weights)
    files = []
    for number, adapter in enumerate(adapters):
        files.append((tmp_path / f"lora{number}.gguf", power))
        convert_adapter(adapter.write(tmp_path / f"adapter{number}"), base, files[-1][0])
    merged = adapters[-1].merged
    wanted = reference(config.text_config, merged, IDS)
    found = error(raw_llama.logits(base, [IDS], files), wanted)
    control = error(raw_llama.logits(write(tmp_path / "merged", config, merged), [IDS]), wanted)
    return found, control, error(raw_llama.logits(base, [IDS]), wanted)


def check(
    tmp_path: Path, config: ModelConfig, weights: dict[str, np.ndarray], *adapters: Adapter, power: float = 1.0
) -> None:
    """Base and adapters are as near to float64 as a file of the merged weights is, and the base alone is far off."""
    found, control, without = errors(tmp_path, config, weights, *adapters, power=power)
    assert without.typical > 20 * found.typical, f"{found} without the adapter: {without}"
    assert found.typical <= 1.25 * control.typical, (found, control)
    assert found.typical < 0.01 and found.other_token <= 0.05, (found, control)


# Models with dense and sparse layers in which two experts or more share a token: of one alone, the router says nothing.
SEEDS = [0, 4, 5, 7, 9]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("part", PARTS)
def test_sparse(part: str, seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    weights = weights_of(config, seed)
    check(tmp_path, config, weights, draw(config, weights, PARTS[part], seed=seed))


@pytest.mark.parametrize("part", ["attention", "values", "dense network", "everything"])
def test_dense(part: str, tmp_path: Path) -> None:
    """llama.cpp's own ``gemma``: no layer in front, no factor."""
    config = tiny_config(moe=None, num_hidden_layers=3, tie_word_embeddings=True)
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, PARTS[part]))


@pytest.mark.parametrize("part", ["attention", "experts"])
@pytest.mark.parametrize("layout", PREFIXES)
def test_names(layout: str, part: str, tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, PARTS[part], layout=layout))


def by_pattern(module: str, rank: int) -> float:
    return (9 if re.fullmatch(r"0\.self_attn\.\w+", module) else 2 if "down_proj" in module else 6) / rank


STRENGTHS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True, "strength": lambda module, rank: 6 / rank**0.5},
    "alpha by module": {
        "alpha_pattern": {r"layers\.0\.self_attn\.\w+": 9, "down_proj": 2},
        "strength": by_pattern,
    },
    # Experts of one layer have different ranks, of which one is not a multiple of anything.
    "rank by module": {"rank": lambda module: 4 + sum(map(ord, module)) % 4},
    "both, rank-stabilised": {
        "use_rslora": True,
        "alpha_pattern": {"down_proj": 2},
        "rank": lambda module: 1 + sum(map(ord, module)) % 5,
        "strength": lambda module, rank: (2 if "down_proj" in module else 6) / rank**0.5,
    },
    "alpha of zero, but for one": {
        "lora_alpha": 0,
        "alpha_pattern": {"q_proj": 6},
        "strength": lambda module, rank: 6 / rank if "q_proj" in module else 0,
    },
}


@pytest.mark.parametrize("kind", STRENGTHS)
def test_strengths(kind: str, tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, ".*", **STRENGTHS[kind]))


def test_the_users_own_scale(tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, ".*", power=0.5), power=0.5)


def test_two_adapters(tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(config)
    first = draw(config, weights, r".*(q|up)_proj")
    check(tmp_path, config, weights, first, draw(config, first.merged, r".*(v|up)_proj|mlp\.gate", seed=1))


def test_some_experts(tmp_path: Path) -> None:
    """An expert without LoRA stays as it is."""
    config = tiny_config()
    weights = weights_of(config)
    check(tmp_path, config, weights, draw(config, weights, r"mlp\.experts\.[02]\.up_proj|mlp\.experts\.3\..*"))


def test_stacked_experts(tmp_path: Path) -> None:
    """Factors of all experts in one tensor, as MLX trains them."""
    config = tiny_config()
    weights = weights_of(config)
    adapter = draw(config, weights, PARTS["experts"], layout="transformers 4")
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in adapter.tensors.items():
        stacks.setdefault(re.sub(r"experts\.\d+", "switch_mlp", name), []).append(array)
    adapter.tensors = {name: np.stack(arrays) for name, arrays in stacks.items()}
    check(tmp_path, config, weights, adapter)


def test_head_and_embedding_of_their_own(tmp_path: Path) -> None:
    """Where the head is not the embedding, both can have LoRA; peft saves the base's embedding beside it."""
    config = tiny_config()
    assert not config.text_config.tie_word_embeddings
    weights = weights_of(config)
    adapter = draw(config, weights, "self_attn.q_proj")
    random = np.random.default_rng(1)
    for path, factors in {
        "language_model.model.embed_tokens": (
            "model.embed_tokens.lora_embedding_A",
            "model.embed_tokens.lora_embedding_B",
        ),
        "language_model.lm_head": ("lm_head.lora_A.weight", "lm_head.lora_B.weight"),
    }.items():
        rows, columns = weights[f"{path}.weight"].shape
        size = (rows, columns) if "head" in path else (columns, rows)  # an embedding's rows are inputs
        down, up = (random.normal(size=shape).astype(np.float32) / 8 for shape in ((4, size[1]), (size[0], 4)))
        delta = 6 / 4 * np.float64(up) @ np.float64(down)
        adapter.merged[f"{path}.weight"] = weights[f"{path}.weight"] + (delta if "head" in path else delta.T)
        adapter.tensors |= {f"base_model.model.{name}": array for name, array in zip(factors, (down, up), strict=True)}
    embedding = weights["language_model.model.embed_tokens.weight"]
    adapter.tensors["base_model.model.model.embed_tokens.base_layer.weight"] = embedding
    check(tmp_path, config, weights, adapter)


@pytest.mark.parametrize("mistake", ["no factor on values", "no shift"])
def test_mistakes_would_be_seen(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_config(4)
    weights = weights_of(config, 4)
    adapter = draw(config, weights, PARTS["attention"])
    if mistake == "no shift":
        # Without layer 0, whose place has matrices of another shape.
        adapter.tensors = {name: array for name, array in adapter.tensors.items() if "layers.0." not in name}
        names = lora_factors.matrix_names(config.text_config)
        shifted = {
            path: re.sub(r"\d+", lambda n: str(max(1, int(n[0]) - 1)), name, count=1) for path, name in names.items()
        }
        monkeypatch.setattr(lora_factors, "matrix_names", lambda text: shifted)
        adapter.merged |= {name: array for name, array in weights.items() if ".layers.0." in name}
    else:
        monkeypatch.setattr(lora_factors, "VALUE_FACTOR", 1.0)
    found, control, _ = errors(tmp_path, config, weights, adapter)
    assert found.typical > 20 * control.typical


@pytest.mark.parametrize("seed", range(8))
def test_targets_are_the_files_matrices(seed: int) -> None:
    config = random_config(seed)
    config = replace(config, text_config=replace(config.text_config, tie_word_embeddings=bool(seed % 3)))
    pieces = {piece.name: piece.tensor.shape for piece in text_model(config, as_tensors(weights_of(config))).pieces}
    targets = {target.name: target.shape for target in lora_targets(config.text_config).values()}
    if "token_embd.weight" in targets:
        targets["token_embd.weight"] = targets["token_embd.weight"][::-1]  # looked up, not multiplied
    assert {name: pieces[name] for name in targets} == targets
    # What is left are layer 0, vectors, matrices of zeros beside the experts, and an embedding that is the head.
    zeros = [
        f"blk.{i + 1}.ffn_{part}.weight" for i in config.text_config.sparse_layers for part in ("gate", "up", "down")
    ]
    left = {name for name, shape in pieces.items() if len(shape) > 1 and not name.startswith("blk.0.")} - targets.keys()
    assert left == {*zeros, *(["token_embd.weight"] if config.text_config.tie_word_embeddings else [])}
