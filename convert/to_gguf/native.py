"""Dense decoders that llama.cpp has as they are: Gemma, Llama, Mistral, Qwen, StableLM and Phi-2.

They are one graph but for what ``Native`` says.

**Rotary positions.** A head's channels are turned in pairs. In our models, as in transformers, channel i goes with
channel i + half; in llama.cpp's ``llama`` with its neighbour. So rows of W_q and W_k change places there, and scores,
which are sums over channels, stay as they are. (llama.cpp's own converter does the same.)

**Heads.** ``stablelm`` and ``phi2`` want a head of its own; where the embedding is the head, it is written twice.
``phi2`` adds a bias to the logits, which MoE-LLaVA's Phi-2 has not: a bias of zeros is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from gm_mlx.config import TextConfig
from gm_mlx.convert.to_gguf.blocks import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    LAST_NORM,
    LAYERS,
    linear,
    network_of,
    norm,
    size_keys,
)
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, constant
from gm_mlx.tensors import Tensor

EPS_KEYS = {"rms": ".attention.layer_norm_rms_epsilon", "layer": ".attention.layer_norm_epsilon"}


@dataclass(frozen=True)
class Native:
    """An architecture of llama.cpp for dense models.

    Attributes:
        name: llama.cpp's name of it.
        neighbours: neighbouring channels of a head are turned together.
        own_head: the head has to be there, even if it is the embedding.
        head_bias: logits have a bias.
    """

    name: str
    neighbours: bool = False
    own_head: bool = False
    head_bias: bool = False


NATIVES = {
    native.name: native
    for native in (
        Native("gemma"),
        Native("llama", neighbours=True),
        Native("qwen2"),
        Native("stablelm", own_head=True),
        Native("phi2", own_head=True, head_bias=True),
    )
}


def native_model(arch: str, text: TextConfig, tensors: Mapping[str, Tensor]) -> GGUFModel:
    """A dense decoder as the architecture of this name, one of ``NATIVES``."""
    native = NATIVES[arch]
    pieces = [Piece("token_embd.weight", tensors[EMBEDDING]), *norm(text, "output_norm", tensors, LAST_NORM)]
    if native.own_head or not text.tie_word_embeddings:
        pieces.insert(1, Piece("output.weight", tensors[EMBEDDING if text.tie_word_embeddings else HEAD]))
    if native.head_bias:
        pieces.insert(2, Piece("output.bias", constant(0, text.vocab_size), "F32"))
    for i in range(text.num_hidden_layers):
        ours, theirs = f"{LAYERS}.{i}", f"blk.{i}"
        pieces += norm(text, f"{theirs}.attn_norm", tensors, f"{ours}.input_layernorm")
        for old, new in ATTENTION.items():
            made = linear(f"{theirs}.{new}", tensors, f"{ours}.self_attn.{old}")
            turned = native.neighbours and old in ("q_proj", "k_proj")
            pieces += (
                [replace(each, tensor=neighbours(each.tensor, text.head_dim)) for each in made] if turned else made
            )
        if not text.parallel_block:
            pieces += norm(text, f"{theirs}.ffn_norm", tensors, f"{ours}.post_attention_layernorm")
        for old, new in network_of(text).items():
            pieces += linear(f"{theirs}.{new}", tensors, f"{ours}.mlp.{old}")
    metadata = {
        ".block_count": text.num_hidden_layers,
        **size_keys(text),
        ".feed_forward_length": text.intermediate_size,
        ".attention.head_count": text.num_attention_heads,
        ".attention.head_count_kv": text.num_key_value_heads,
        EPS_KEYS[text.norm]: text.rms_norm_eps,
    }
    return GGUFModel(arch, metadata, pieces)


def neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows [H * Dh, ...] in an order in which the two channels that are turned together are neighbours."""

    def read() -> mx.array:
        halves = rows.read().reshape(-1, 2, head_dim // 2, *rows.shape[1:])  # [H, 2, Dh / 2, ...]
        return halves.swapaxes(1, 2).reshape(rows.shape)

    return replace(rows, read=read)
