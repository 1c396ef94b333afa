"""Llama, Mistral and Qwen with experts as llama.cpp's ``step35``.

``step35`` (Step-3.5) is a pre-norm decoder with RMSNorm and SwiGLU whose layers are dense or sparse, as their tensors
have it (``models/step35.cpp``). Biases of q, k and v, norms of q and k and gates of heads are used where the file has
them. The router's function, and whether the chosen weights are divided by their sum, are keys. So every layer is
written as it is, and four things are to be known:

**A last layer of zeros.** One layer at least must be a sliding-window layer, or llama.cpp stops at an assertion. That
is a layer more, behind all others, with one head and a W_o of zeros. It has no network at all: what llama.cpp computes
then is silu(norm(x)), and the norm's weight is zero. Its window is short, because llama-server reuses the beginning of
a prompt that is longer than the window, and of none that is shorter.

**Shared experts.** A sparse layer has one beside the others, which always works. It is 32 wide and zero.

**Rotary positions.** llama.cpp turns half as many channels as the file says, so the file says twice as many.

**Heads.** The head has to be there; where it is the embedding, it is written twice.

Because the number of turned channels may differ by layer here, llama.cpp does not shift the context of such a model
when it is full (``llama_kv_cache::get_can_shift``); ``gemma4`` can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gm_mlx.config import TextConfig
from gm_mlx.convert.to_gguf.blocks import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    LAST_NORM,
    LAYERS,
    NETWORK,
    ZERO_WIDTH,
    expert_keys,
    expert_width,
    linear,
    norm,
    router,
    size_keys,
)
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, constant
from gm_mlx.tensors import Tensor

SOFTMAX = 1  # of llama.cpp's functions of a router
WINDOW = 32  # positions that the last layer looks back


def zero_matrices(text: TextConfig) -> Iterator[tuple[str, int]]:
    """Names and row widths of the matrices that the file has and the model has not."""
    last = f"blk.{text.num_hidden_layers}"
    yield from ((f"{last}.{name}.weight", shape[1]) for name, shape in _last_attention(text).items())
    for i in text.sparse_layers:
        yield from ((f"blk.{i}.{name}.weight", shape[1]) for name, shape in _shared_expert(text).items())


def step35_model(text: TextConfig, tensors: Mapping[str, Tensor]) -> GGUFModel:
    """A decoder with RMSNorm and SwiGLU, some of whose layers may have experts."""
    size, layers = text.hidden_size, text.num_hidden_layers
    pieces = [
        Piece("token_embd.weight", tensors[EMBEDDING]),
        Piece("output.weight", tensors[EMBEDDING if text.tie_word_embeddings else HEAD]),
        *norm(text, "output_norm", tensors, LAST_NORM),
    ]
    for i in range(layers):
        ours, theirs = f"{LAYERS}.{i}", f"blk.{i}"
        pieces += norm(text, f"{theirs}.attn_norm", tensors, f"{ours}.input_layernorm")
        for old, new in ATTENTION.items():
            pieces += linear(f"{theirs}.{new}", tensors, f"{ours}.self_attn.{old}")
        pieces += norm(text, f"{theirs}.ffn_norm", tensors, f"{ours}.post_attention_layernorm")
        place, suffix = ("switch_mlp.", "_exps") if i in text.sparse_layers else ("", "")
        for old, new in NETWORK.items():
            pieces += linear(f"{theirs}.{new}{suffix}", tensors, f"{ours}.mlp.{place}{old}")
        if i in text.sparse_layers:
            pieces.append(Piece(f"{theirs}.ffn_gate_inp.weight", router(text, tensors, f"{ours}.mlp.gate"), "F32"))
            pieces += [
                Piece(f"{theirs}.{name}.weight", constant(0, *shape)) for name, shape in _shared_expert(text).items()
            ]
    last = f"blk.{layers}"
    pieces += [Piece(f"{last}.{name}.weight", constant(0, *shape)) for name, shape in _last_attention(text).items()]
    pieces += [Piece(f"{last}.{name}.weight", constant(0, size), "F32") for name in ("attn_norm", "ffn_norm")]
    metadata = {
        ".block_count": layers + 1,
        **size_keys(text),
        **expert_keys(text),
        ".feed_forward_length": text.intermediate_size,
        ".attention.head_count": [text.num_attention_heads] * layers + [1],
        ".attention.head_count_kv": [text.num_key_value_heads] * layers + [1],
        ".attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        ".rope.dimension_count": 2 * text.rotary_dim,
        ".rope.dimension_count_swa": text.rotary_dim,
        ".attention.sliding_window": WINDOW,
        ".attention.sliding_window_pattern": [False] * layers + [True],
        ".expert_feed_forward_length": expert_width(text),
        ".expert_shared_feed_forward_length": ZERO_WIDTH,
        ".expert_gating_func": SOFTMAX,
        ".expert_weights_norm": text.moe is not None and text.moe.norm_topk_prob,
        "gm.num_hidden_layers": layers,
        "gm.sparse_layers": text.sparse_layers,
    }
    return GGUFModel("step35", metadata, pieces)


def _last_attention(text: TextConfig) -> dict[str, tuple[int, int]]:
    size, dim = text.hidden_size, text.head_dim
    return {"attn_q": (dim, size), "attn_k": (dim, size), "attn_v": (dim, size), "attn_output": (size, dim)}


def _shared_expert(text: TextConfig) -> dict[str, tuple[int, int]]:
    size, width = text.hidden_size, ZERO_WIDTH
    return {"ffn_gate_shexp": (width, size), "ffn_up_shexp": (width, size), "ffn_down_shexp": (size, width)}
