"""Gemma with experts as llama.cpp's ``gemma4``.

llama.cpp has no architecture for a Gemma-1 block with experts in some layers. But its ``gemma4`` has all that such a
model needs: dense and sparse layers in any order, GeGLU experts, a softmax router whose top-k weights are renormalised,
head counts and FFN widths per layer. It has more than that: norms on q, k and v, and norms behind attention and behind
the networks, none of which can be left out. So the model is re-expressed with numbers that make these norms vanish.

**A norm that does nothing.** An RMS norm computes y * w / sqrt(mean(y^2) + eps). If eps is very large against
mean(y^2), this is y * w / sqrt(eps), and with w = sqrt(eps) it is y. With eps = 2^20 and the activations of a trained
network the error is about mean(y^2) / 2^21, a millionth.

**A norm that works as before.** llama.cpp has one eps for all norms, and those in front of attention and of the
networks must really normalise, with Gemma's own eps (1e-6). They read the residual stream, and a norm does not see how
long its input is, but for eps: with the stream A times as long, eps acts like eps / A^2. So the stream is made
A = sqrt(2^20 / 1e-6), about a million, times as long, and whatever is added to it must be A times as long too. The
norms behind attention and the networks do that: their weight is A * sqrt(eps). The stream is float32 in every backend.

**Where A comes in.** An extra layer 0 has matrices of zeros: it adds nothing to the stream, and its output scale is A.
It has one head of 32 channels, an FFN 32 wide and costs next to nothing. It is also the sliding-window layer without
which llama.cpp stops at an assertion. Its window is short: llama-server reuses the beginning of a prompt that is longer
than the window, and of none that is shorter. What lies outside of it is not missed by a layer of zeros. Layer i of the
model is ``blk.{i+1}``. At the end nothing is to be undone: the last norm takes A out of the stream.

**Values in the cache.** The norm on v has no weight, so W_v is multiplied by sqrt(eps) to survive it, and by 1/64 to
keep float16 products of backends that use them far from overflow: by 16 together, which rounds nothing. The norm behind
attention multiplies by 64 again.

**Routers.** gemma4's router reads the stream after a norm without weights, scaled by 1 / sqrt(n_embd) and by a vector.
The vector is sqrt(n_embd), and the weights of the layer's norm go into the router's columns. A low-rank router is
written as the product of its factors: four rows of float32.

All that is left of gemma4 beside the experts, a dense network in every sparse layer, is 32 wide and zero.
"""

from __future__ import annotations

import math
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
    norm,
    norm_weights,
    router,
    size_keys,
)
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, changed, constant, scaled
from gm_mlx.tensors import Tensor

EPS = 2.0**20  # of all norms of a re-expressed model
VALUE_SCALE = 1 / 64  # of values in the cache
VALUE_FACTOR = math.sqrt(EPS) * VALUE_SCALE  # of W_v
WINDOW = 32  # positions that layer 0 looks back


def residual_scale(text: TextConfig) -> float:
    """A: how many times as long the residual stream of a re-expressed model is."""
    return math.sqrt(EPS / text.rms_norm_eps)


def zero_matrices(text: TextConfig) -> Iterator[tuple[str, int]]:
    """Names and row widths of the matrices that the file has and the model has not."""
    network = [("ffn_gate", text.hidden_size), ("ffn_up", text.hidden_size), ("ffn_down", ZERO_WIDTH)]
    attention = [(f"attn_{part}", text.hidden_size) for part in ("q", "k", "v")] + [("attn_output", ZERO_WIDTH)]
    yield from ((f"blk.0.{name}.weight", width) for name, width in attention + network)
    for i in text.sparse_layers:
        yield from ((f"blk.{i + 1}.{name}.weight", width) for name, width in network)


def gemma4_model(text: TextConfig, tensors: Mapping[str, Tensor]) -> GGUFModel:
    """A Gemma decoder, some of whose layers may have experts."""
    pieces = [
        Piece("token_embd.weight", tensors[EMBEDDING]),
        *norm(text, "output_norm", tensors, LAST_NORM),
        Piece("rope_freqs.weight", constant(1, text.head_dim // 2), stored="F32"),
        *_layer_zero(text),
    ]
    if not text.tie_word_embeddings:
        pieces.insert(1, Piece("output.weight", tensors[HEAD]))
    for i in range(text.num_hidden_layers):
        pieces += _layer(text, tensors, i)
    sparse = set(text.sparse_layers)
    widths = [ZERO_WIDTH if i in sparse else text.intermediate_size for i in range(text.num_hidden_layers)]
    metadata = {
        ".block_count": 1 + text.num_hidden_layers,
        **size_keys(text),
        **expert_keys(text),
        ".feed_forward_length": [ZERO_WIDTH, *widths],
        ".attention.head_count": [1, *[text.num_attention_heads] * text.num_hidden_layers],
        ".attention.head_count_kv": [1, *[text.num_key_value_heads] * text.num_hidden_layers],
        ".attention.layer_norm_rms_epsilon": EPS,
        ".attention.key_length_swa": ZERO_WIDTH,
        ".attention.value_length_swa": ZERO_WIDTH,
        ".rope.dimension_count_swa": ZERO_WIDTH,
        ".attention.sliding_window": WINDOW,
        ".attention.sliding_window_pattern": [True, *[False] * text.num_hidden_layers],
        ".attention.shared_kv_layers": 0,
        ".embedding_length_per_layer_input": 0,
        ".final_logit_softcapping": 0.0,  # llama.cpp's default is gemma4's own 30
    }
    if sparse:
        metadata[".expert_feed_forward_length"] = expert_width(text)
    ours = {
        "gm.residual_scale": residual_scale(text),
        "gm.num_hidden_layers": text.num_hidden_layers,
        "gm.sparse_layers": text.sparse_layers,
    }
    return GGUFModel("gemma4", {**metadata, **ours}, pieces)


def _layer_zero(text: TextConfig) -> list[Piece]:
    """A layer that adds nothing to the stream and makes it A times as long."""
    size, width = text.hidden_size, ZERO_WIDTH
    matrices = {
        "attn_q": (width, size),
        "attn_k": (width, size),
        "attn_v": (width, size),
        "attn_output": (size, width),
        "ffn_gate": (width, size),
        "ffn_up": (width, size),
        "ffn_down": (size, width),
    }
    norms = {"attn_norm": size, "attn_q_norm": width, "attn_k_norm": width, "post_attention_norm": size}
    norms |= {"ffn_norm": size, "post_ffw_norm": size}
    return [
        *(Piece(f"blk.0.{name}.weight", constant(0, *shape)) for name, shape in matrices.items()),
        *(Piece(f"blk.0.{name}.weight", constant(1, length), stored="F32") for name, length in norms.items()),
        Piece("blk.0.layer_output_scale.weight", constant(residual_scale(text), 1), stored="F32"),
    ]


def _layer(text: TextConfig, tensors: Mapping[str, Tensor], i: int) -> list[Piece]:
    ours, theirs = f"{LAYERS}.{i}", f"blk.{i + 1}"
    size, dim, root, scale = text.hidden_size, text.head_dim, math.sqrt(EPS), residual_scale(text)
    constants = {
        "attn_q_norm": (root / math.sqrt(dim), dim),  # gemma4 does not scale attention by 1 / sqrt(head_dim)
        "attn_k_norm": (root, dim),
        "post_attention_norm": (scale * root / VALUE_SCALE, size),
        "post_ffw_norm": (scale * root, size),
    }
    if i in text.sparse_layers:
        constants |= {"post_ffw_norm_1": (1, size), "post_ffw_norm_2": (root, size)}
        network = _experts(text, tensors, ours, theirs)
    else:
        network = _network(tensors, ours, theirs)
    return [
        *norm(text, f"{theirs}.attn_norm", tensors, f"{ours}.input_layernorm"),
        *_attention(tensors, ours, theirs),
        *norm(text, f"{theirs}.ffn_norm", tensors, f"{ours}.post_attention_layernorm"),
        *network,
        *(Piece(f"{theirs}.{name}.weight", constant(*value), stored="F32") for name, value in constants.items()),
    ]


def _attention(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> list[Piece]:
    matrices = {new: tensors[f"{ours}.self_attn.{old}.weight"] for old, new in ATTENTION.items()}
    matrices["attn_v"] = scaled(matrices["attn_v"], VALUE_FACTOR)
    return [Piece(f"{theirs}.{name}.weight", matrix) for name, matrix in matrices.items()]


def _network(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> list[Piece]:
    return [Piece(f"{theirs}.{new}.weight", tensors[f"{ours}.mlp.{old}.weight"]) for old, new in NETWORK.items()]


def _experts(text: TextConfig, tensors: Mapping[str, Tensor], ours: str, theirs: str) -> list[Piece]:
    size = text.hidden_size
    beside = {"ffn_gate": (ZERO_WIDTH, size), "ffn_up": (ZERO_WIDTH, size), "ffn_down": (size, ZERO_WIDTH)}
    weight = tensors[f"{ours}.post_attention_layernorm.weight"]
    # The router reads a norm without weights.
    rows = changed(router(text, tensors, f"{ours}.mlp.gate"), lambda rows: rows * norm_weights(text, weight.read()))
    return [
        *(Piece(f"{theirs}.{name}.weight", constant(0, *shape)) for name, shape in beside.items()),
        *norm(text, f"{theirs}.pre_ffw_norm_2", tensors, f"{ours}.post_attention_layernorm"),
        Piece(f"{theirs}.ffn_gate_inp.weight", rows, stored="F32"),
        Piece(f"{theirs}.ffn_gate_inp.scale", constant(math.sqrt(size), size), stored="F32"),
        *(
            Piece(f"{theirs}.{new}_exps.weight", tensors[f"{ours}.mlp.switch_mlp.{old}.weight"])
            for old, new in NETWORK.items()
        ),
    ]
