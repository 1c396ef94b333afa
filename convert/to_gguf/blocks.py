"""What llama.cpp's decoders have in common: names of tensors, norms, linears, routers and the keys of their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from gm_mlx.config import TextConfig
from gm_mlx.convert.to_gguf.pieces import Piece, changed
from gm_mlx.tensors import Tensor

ZERO_WIDTH = 32  # of what only has to exist: the narrowest row that quantizes
LAYERS = "language_model.model.layers"
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
LAST_NORM = "language_model.model.norm"

# Linears of a layer, ours and theirs.
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NETWORK = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
PLAIN_NETWORK = {"fc1": "ffn_up", "fc2": "ffn_down"}


def network_of(text: TextConfig) -> dict[str, str]:
    """The linears of the model's networks, ours and theirs."""
    return NETWORK if text.gated else PLAIN_NETWORK


def layer_matrices(text: TextConfig, i: int, theirs: str, sparse: bool) -> dict[str, str]:
    """The name of each linear of layer i, by our path of it; ``theirs`` is the layer's own name."""
    ours, place, suffix = f"{LAYERS}.{i}", *(("switch_mlp.", "_exps") if sparse else ("", ""))
    return {
        **{f"{ours}.self_attn.{old}": f"{theirs}.{new}.weight" for old, new in ATTENTION.items()},
        **{f"{ours}.mlp.{place}{old}": f"{theirs}.{new}{suffix}.weight" for old, new in network_of(text).items()},
    }


def matrix_names(text: TextConfig, first: int = 0) -> dict[str, str]:
    """The name of each linear of the decoder's layers, by our path of it; layer 0 is ``blk.<first>``."""
    names: dict[str, str] = {}
    for i in range(text.num_hidden_layers):
        names |= layer_matrices(text, i, f"blk.{i + first}", i in text.sparse_layers)
    return names


def linear(name: str, tensors: Mapping[str, Tensor], path: str) -> list[Piece]:
    """Weight of a linear layer, ours by its path, and its bias if it has one."""
    bias = tensors.get(f"{path}.bias")
    pieces = [Piece(f"{name}.weight", tensors[f"{path}.weight"])]
    return pieces if bias is None else [*pieces, Piece(f"{name}.bias", bias, "F32")]


def norm(text: TextConfig, name: str, tensors: Mapping[str, Tensor], path: str) -> list[Piece]:
    """Weight of a norm, as what it multiplies by, and its bias if it has one."""
    weight = changed(tensors[f"{path}.weight"], lambda values: norm_weights(text, values))
    bias = tensors.get(f"{path}.bias")
    pieces = [Piece(f"{name}.weight", weight, "F32")]
    return pieces if bias is None else [*pieces, Piece(f"{name}.bias", bias, "F32")]


def norm_weights(text: TextConfig, values: mx.array) -> mx.array:
    """What a norm multiplies by, float32; Gemma stores its distance from one."""
    return values.astype(mx.float32) + (1 if text.norm_plus_one else 0)


def router(text: TextConfig, tensors: Mapping[str, Tensor], path: str) -> Tensor:
    """A router's rows, float32 [E, D]; one of low rank is the product of its factors."""
    assert text.moe is not None
    full = tensors.get(f"{path}.weight")

    def read() -> mx.array:
        if full is not None:
            return full.read().astype(mx.float32)
        # In float64, so that the file does not depend on which library multiplies.
        u, v = (np.array(tensors[f"{path}.{part}"].read().astype(mx.float32), np.float64) for part in ("u", "v"))
        return mx.array((u @ v).T.astype(np.float32))  # [D, r] [r, E] to [E, D]

    return Tensor("F32", (text.moe.num_experts, text.hidden_size), read)


def size_keys(text: TextConfig) -> dict[str, Any]:
    """Sizes that every architecture asks for under the same keys."""
    return {
        ".context_length": text.max_position_embeddings,
        ".embedding_length": text.hidden_size,
        ".attention.key_length": text.head_dim,
        ".attention.value_length": text.head_dim,
        ".rope.dimension_count": text.rotary_dim,
        ".rope.freq_base": float(text.rope_theta),
    }


def expert_keys(text: TextConfig) -> dict[str, Any]:
    """How many experts there are; none for a dense model."""
    if not text.sparse_layers or text.moe is None:
        return {}
    return {".expert_count": text.moe.num_experts, ".expert_used_count": text.moe.top_k}


def expert_width(text: TextConfig) -> int:
    """Neurons of an expert."""
    return (text.moe.expert_size if text.moe else 0) or text.intermediate_size
