"""StableLM with experts as llama.cpp's ``phimoe``.

``phimoe`` (Phi-3.5-MoE) is the one graph of llama.cpp that has both experts and norms with biases. It is a pre-norm
decoder with SwiGLU experts, a softmax router whose top-k weights are renormalised, and partial rotary positions
(``models/phi3.cpp``). StableLM differs from it in two ways.

**Norms.** They are LayerNorms, and phimoe's are RMSNorms with a bias. The two are the same for numbers whose mean is
zero. The residual stream is a sum of token embeddings, image features and what W_o and the networks' last matrices
add to it. So the mean over channels is taken out of all of these beforehand: then the stream's mean is zero in every
layer. A LayerNorm does not see the difference, and nothing else reads the stream.

**Dense layers.** phimoe has experts in every layer (``models/phimoe.cpp``: their tensors are not optional). A dense
network is written as experts that are all alike: whichever are chosen, their weights sum to one. This costs memory and
time: a dense layer is E times as large as it was, and k networks run where one did. MoE-LLaVA-StableLM's decoder grows
from 2.89 to 4.14 billion parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from gm_mlx.config import TextConfig
from gm_mlx.convert.to_gguf.blocks import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    LAST_NORM,
    LAYERS,
    NETWORK,
    expert_keys,
    expert_width,
    layer_matrices,
    linear,
    norm,
    router,
    size_keys,
)
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, changed, constant
from gm_mlx.tensors import Tensor


def matrix_names(text: TextConfig) -> dict[str, str]:
    """The name of each linear of the decoder's layers, by our path of it; dense networks are stacked, too."""
    names: dict[str, str] = {}
    for i in range(text.num_hidden_layers):
        both = {sparse: layer_matrices(text, i, f"blk.{i}", sparse) for sparse in (False, True)}
        names |= dict(zip(both[i in text.sparse_layers], both[True].values(), strict=True))
    return names


def phimoe_model(text: TextConfig, tensors: Mapping[str, Tensor]) -> GGUFModel:
    """A decoder with LayerNorm and SwiGLU, some of whose layers have experts."""
    size = text.hidden_size
    pieces = [
        Piece("token_embd.weight", centred(tensors[EMBEDDING], -1)),
        Piece("output.weight", tensors[EMBEDDING if text.tie_word_embeddings else HEAD]),
        Piece("output.bias", constant(0, text.vocab_size), "F32"),
        *norm(text, "output_norm", tensors, LAST_NORM),
    ]
    for i in range(text.num_hidden_layers):
        ours, theirs = f"{LAYERS}.{i}", f"blk.{i}"
        pieces += norm(text, f"{theirs}.attn_norm", tensors, f"{ours}.input_layernorm")
        for old, new in ATTENTION.items():
            made = linear(f"{theirs}.{new}", tensors, f"{ours}.self_attn.{old}")
            pieces += [_centred(each) for each in made] if old == "o_proj" else made
        if f"{ours}.self_attn.o_proj.bias" not in tensors:
            pieces.append(Piece(f"{theirs}.attn_output.bias", constant(0, size), "F32"))
        pieces += norm(text, f"{theirs}.ffn_norm", tensors, f"{ours}.post_attention_layernorm")
        pieces += _experts(text, tensors, i)
    metadata = {
        ".block_count": text.num_hidden_layers,
        **size_keys(text),
        **expert_keys(text),
        ".feed_forward_length": expert_width(text),
        ".attention.head_count": text.num_attention_heads,
        ".attention.head_count_kv": text.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "gm.num_hidden_layers": text.num_hidden_layers,
        "gm.sparse_layers": text.sparse_layers,
    }
    return GGUFModel("phimoe", metadata, pieces)


def _experts(text: TextConfig, tensors: Mapping[str, Tensor], i: int) -> list[Piece]:
    assert text.moe is not None
    path, theirs, count = f"{LAYERS}.{i}.mlp", f"blk.{i}", text.moe.num_experts
    sparse = i in text.sparse_layers
    rows = router(text, tensors, f"{path}.gate") if sparse else constant(0, count, text.hidden_size)
    pieces = [Piece(f"{theirs}.ffn_gate_inp.weight", rows, "F32")]
    for old, new in NETWORK.items():
        name = f"{path}.{'switch_mlp.' if sparse else ''}{old}.weight"
        matrix = tensors[name] if sparse else _repeated(tensors[name], count)
        pieces.append(Piece(f"{theirs}.{new}_exps.weight", centred(matrix, -2) if old == "down_proj" else matrix))
    return pieces


def centred(tensor: Tensor, axis: int) -> Tensor:
    """A tensor without its mean over an axis, float32."""
    return changed(tensor, lambda values: values - values.mean(axis, keepdims=True))


def _centred(piece: Piece) -> Piece:
    """A linear layer's weight [out, in] or bias [out], such that what it gives has a mean of zero."""
    return replace(piece, tensor=centred(piece.tensor, 0))


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """A matrix [out, in] as experts [E, out, in] that are all alike."""
    shape = (count, *tensor.shape)
    return replace(tensor, shape=shape, read=lambda: mx.broadcast_to(tensor.read(), shape))
