"""The decoder for llama.cpp. A dense Gemma is its architecture ``gemma``; one with experts is written as ``gemma4``.

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
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from gm_mlx.config import ModelConfig, TextConfig
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, changed, constant, scaled
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor

EPS = 2.0**20  # of all norms of a re-expressed model
VALUE_SCALE = 1 / 64  # of values in the cache
WINDOW = 32  # positions that layer 0 looks back
ZERO_WIDTH = 32  # of what only has to exist: the narrowest row that quantizes
LAYERS = "language_model.model.layers"
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
LAST_NORM = "language_model.model.norm.weight"

# Tensors that both architectures share, by ours.
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output"}
NETWORK = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def residual_scale(text: TextConfig) -> float:
    """A: how many times as long the residual stream of a re-expressed model is."""
    return math.sqrt(EPS / text.rms_norm_eps)


def is_native(text: TextConfig) -> bool:
    """Whether llama.cpp's ``gemma`` is this model as it is: dense, with the embedding as its head."""
    return not text.sparse_layers and text.tie_word_embeddings


def matrix_names(text: TextConfig) -> dict[str, str]:
    """The name in a GGUF file of each linear of the decoder's layers, by our path of it."""
    names: dict[str, str] = {}
    first = 0 if is_native(text) else 1  # the layer that only scales comes before ours
    for i in range(text.num_hidden_layers):
        ours, theirs = f"{LAYERS}.{i}", f"blk.{i + first}"
        names |= {
            f"{ours}.self_attn.{old}": f"{theirs}.{new}" for old, new in {**ATTENTION, "v_proj": "attn_v"}.items()
        }
        place, suffix = ("switch_mlp.", "_exps") if i in text.sparse_layers else ("", "")
        names |= {f"{ours}.mlp.{place}{old}": f"{theirs}.{new}{suffix}" for old, new in NETWORK.items()}
    return {path: f"{name}.weight" for path, name in names.items()}


def check_expressible(text: TextConfig) -> None:
    """Refuse a decoder that neither architecture is; raises ``UserError`` with the key and the reason."""
    moe = text.moe if text.sparse_layers else None
    renormalised = moe is None or moe.norm_topk_prob or moe.top_k == moe.num_experts
    needed = {
        "norm": (text.norm == "rms", "has no LayerNorm"),
        "scale_embeddings": (text.scale_embeddings, "scales token embeddings by sqrt(hidden_size)"),
        "attention_bias": (text.attention_bias == "none", "has no biases in attention"),
        "partial_rotary_factor": (text.rotary_dim == text.head_dim, "rotates whole heads"),
        "parallel_block": (not text.parallel_block, "runs attention and network one after the other"),
        "gated": (text.gated, "has gated networks only"),
        "hidden_act": (text.hidden_act == "gelu_pytorch_tanh", "has the tanh GELU only"),
        "moe.norm_topk_prob": (renormalised, "divides the chosen experts' probabilities by their sum"),
        "moe.use_residual": (moe is None or not moe.use_residual, "has no learnt mix of experts and a dense network"),
    }
    for key, (fits, what) in needed.items():
        if not fits:
            value: Any = text.moe if key.startswith("moe.") else text
            raise UserError(
                f"text_config.{key}: {getattr(value, key.removeprefix('moe.'))!r} cannot be written as GGUF: of the "
                f"architectures of llama.cpp that are used here, each {what}; convert to a model folder instead"
            )


def text_model(config: ModelConfig, tensors: Mapping[str, Tensor], *, native: bool | None = None) -> GGUFModel:
    """The decoder as llama.cpp runs it; tokenizer and general keys are not in it.

    Args:
        config: the model's config.
        tensors: its tensors by gm-mlx's names, none of them quantized.
        native: write ``gemma``, or re-express as ``gemma4``; by default the first where it is possible. A dense model
            in both is how the cost of the second is measured.

    Raises:
        UserError: llama.cpp cannot express the decoder exactly.
    """
    text = config.text_config
    check_expressible(text)
    return _native(text, tensors) if (is_native(text) if native is None else native) else _reexpressed(text, tensors)


def _native(text: TextConfig, tensors: Mapping[str, Tensor]) -> GGUFModel:
    pieces = [Piece("token_embd.weight", tensors[EMBEDDING]), _norm(text, "output_norm", tensors[LAST_NORM])]
    for i in range(text.num_hidden_layers):
        ours, theirs = f"{LAYERS}.{i}", f"blk.{i}"
        pieces += [
            _norm(text, f"{theirs}.attn_norm", tensors[f"{ours}.input_layernorm.weight"]),
            *_attention(tensors, ours, theirs, value_factor=1),
            _norm(text, f"{theirs}.ffn_norm", tensors[f"{ours}.post_attention_layernorm.weight"]),
            *_network(tensors, ours, theirs),
        ]
    metadata = {
        ".block_count": text.num_hidden_layers,
        **_shared_keys(text),
        ".feed_forward_length": text.intermediate_size,
        ".attention.head_count": text.num_attention_heads,
        ".attention.head_count_kv": text.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": text.rms_norm_eps,
    }
    return GGUFModel("gemma", metadata, pieces)


def _reexpressed(text: TextConfig, tensors: Mapping[str, Tensor]) -> GGUFModel:
    pieces = [
        Piece("token_embd.weight", tensors[EMBEDDING]),
        _norm(text, "output_norm", tensors[LAST_NORM]),
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
        **_shared_keys(text),
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
        assert text.moe is not None
        metadata[".expert_count"] = text.moe.num_experts
        metadata[".expert_used_count"] = text.moe.top_k
        metadata[".expert_feed_forward_length"] = text.moe.expert_size or text.intermediate_size
    ours = {
        "gm.residual_scale": residual_scale(text),
        "gm.num_hidden_layers": text.num_hidden_layers,
        "gm.sparse_layers": text.sparse_layers,
    }
    return GGUFModel("gemma4", {**metadata, **ours}, pieces)


def _shared_keys(text: TextConfig) -> dict[str, Any]:
    return {
        ".context_length": text.max_position_embeddings,
        ".embedding_length": text.hidden_size,
        ".attention.key_length": text.head_dim,
        ".attention.value_length": text.head_dim,
        ".rope.dimension_count": text.head_dim,
        ".rope.freq_base": float(text.rope_theta),
    }


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
    ffn_norm = tensors[f"{ours}.post_attention_layernorm.weight"]
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
        _norm(text, f"{theirs}.attn_norm", tensors[f"{ours}.input_layernorm.weight"]),
        *_attention(tensors, ours, theirs, value_factor=root * VALUE_SCALE),
        _norm(text, f"{theirs}.ffn_norm", ffn_norm),
        *network,
        *(Piece(f"{theirs}.{name}.weight", constant(*value), stored="F32") for name, value in constants.items()),
    ]


def _attention(tensors: Mapping[str, Tensor], ours: str, theirs: str, value_factor: float) -> list[Piece]:
    pieces = [
        Piece(f"{theirs}.{new}.weight", tensors[f"{ours}.self_attn.{old}.weight"]) for old, new in ATTENTION.items()
    ]
    values = scaled(tensors[f"{ours}.self_attn.v_proj.weight"], value_factor)
    return [*pieces, Piece(f"{theirs}.attn_v.weight", values)]


def _network(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> list[Piece]:
    return [Piece(f"{theirs}.{new}.weight", tensors[f"{ours}.mlp.{old}.weight"]) for old, new in NETWORK.items()]


def _experts(text: TextConfig, tensors: Mapping[str, Tensor], ours: str, theirs: str) -> list[Piece]:
    size = text.hidden_size
    beside = {"ffn_gate": (ZERO_WIDTH, size), "ffn_up": (ZERO_WIDTH, size), "ffn_down": (size, ZERO_WIDTH)}
    norm = tensors[f"{ours}.post_attention_layernorm.weight"]
    return [
        *(Piece(f"{theirs}.{name}.weight", constant(0, *shape)) for name, shape in beside.items()),
        _norm(text, f"{theirs}.pre_ffw_norm_2", norm),
        Piece(f"{theirs}.ffn_gate_inp.weight", _router(text, tensors, f"{ours}.mlp.gate", norm), stored="F32"),
        Piece(f"{theirs}.ffn_gate_inp.scale", constant(math.sqrt(size), size), stored="F32"),
        *(
            Piece(f"{theirs}.{new}_exps.weight", tensors[f"{ours}.mlp.switch_mlp.{old}.weight"])
            for old, new in NETWORK.items()
        ),
    ]


def _router(text: TextConfig, tensors: Mapping[str, Tensor], path: str, norm: Tensor) -> Tensor:
    """A router that reads a norm without weights: its own rows times the norm's weights, float32 [E, D]."""
    assert text.moe is not None
    full = tensors.get(f"{path}.weight")

    def read() -> mx.array:
        if full is not None:
            rows = full.read().astype(mx.float32)
        else:
            # In float64, so that the file does not depend on which library multiplies.
            u, v = (np.array(tensors[f"{path}.{part}"].read().astype(mx.float32), np.float64) for part in ("u", "v"))
            rows = mx.array((u @ v).T.astype(np.float32))  # [D, r] [r, E] to [E, D]
        return rows * _weights(text, norm.read())

    return Tensor("F32", (text.moe.num_experts, text.hidden_size), read)


def _norm(text: TextConfig, name: str, weight: Tensor) -> Piece:
    return Piece(f"{name}.weight", changed(weight, lambda values: _weights(text, values)), stored="F32")


def _weights(text: TextConfig, values: mx.array) -> mx.array:
    """What a norm multiplies by; Gemma stores its distance from one."""
    return values.astype(mx.float32) + (1 if text.norm_plus_one else 0)
