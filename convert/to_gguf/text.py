"""The decoder for llama.cpp: which of its architectures can be this model, exactly.

Dense decoders are architectures of llama.cpp as they are (``native``). For decoders with experts in some of their
layers it has no such architecture, and they are re-expressed as one that has what they need: Gemma as ``gemma4``,
Llama, Mistral and Qwen as ``step35``, StableLM as ``phimoe``. Each of these has a file here that says how.
``docs/gguf-support.md`` says why it is these, and what llama.cpp has nothing for.

``ARCHITECTURES`` is a table: what a decoder must be like, and the functions that write it. The first that fits is
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gm_mlx.config import ModelConfig, TextConfig
from gm_mlx.convert.to_gguf import blocks, gemma4, native, phimoe, step35
from gm_mlx.convert.to_gguf.pieces import GGUFModel
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor

HEADS_FILL = "hidden_size / num_attention_heads"
TANH_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp and how a decoder is written as it.

    Attributes:
        name: llama.cpp's name of it.
        takes: of each trait (see ``traits``): the values that it can express.
        write: makes the file's contents from the config and the model's tensors.
        matrix_names: the name in the file of each linear of the decoder's layers, by our path of it.
        zero_matrices: names and row widths of matrices that the file has and the model has not.
        scales_inputs: multiplies all that enters, image features too, by sqrt(hidden_size).
        centred: what enters must have a mean of zero over its channels.
    """

    name: str
    takes: Mapping[str, tuple[Any, ...]]
    write: Callable[[TextConfig, Mapping[str, Tensor]], GGUFModel]
    matrix_names: Callable[[TextConfig], dict[str, str]]
    zero_matrices: Callable[[TextConfig], Iterable[tuple[str, int]]] = lambda _: ()
    scales_inputs: bool = False
    centred: bool = False


def traits(text: TextConfig) -> dict[str, Any]:
    """What architectures differ in, by the config's keys."""
    moe = text.moe if text.sparse_layers else None
    dense = len(text.sparse_layers) < text.num_hidden_layers
    same_width = moe is None or not dense or moe.expert_size in (0, text.intermediate_size)
    return {
        "moe": None if moe is None else "experts",
        "scale_embeddings": text.scale_embeddings,
        "norm": text.norm,
        "attention_bias": text.attention_bias,
        "partial_rotary_factor": 1.0 if text.rotary_dim == text.head_dim else text.partial_rotary_factor,
        "parallel_block": text.parallel_block,
        "gated": text.gated,
        "hidden_act": text.hidden_act,
        "tie_word_embeddings": text.tie_word_embeddings,
        "head_dim": HEADS_FILL if text.head_dim * text.num_attention_heads == text.hidden_size else text.head_dim,
        "series_layers": text.series_layers,
        "shortcut_size": text.shortcut_size,
        "moe.kind": "experts" if moe is None else moe.kind,
        # The sum of all probabilities is one already.
        "moe.norm_topk_prob": moe is None or moe.norm_topk_prob or moe.top_k == moe.num_experts,
        "moe.use_residual": moe is not None and moe.use_residual,
        "moe.expert_size": 0 if same_width or moe is None else moe.expert_size,
    }


# Of a trait that an architecture does not name, it takes any value.
SEQUENTIAL = {"parallel_block": (False,), "gated": (True,), "series_layers": (0,), "shortcut_size": (0,)}
DENSE = {"moe": (None,)}
EXPERTS = {"moe.kind": ("experts",), "moe.use_residual": (False,)}
GEMMA = {
    **SEQUENTIAL,
    "norm": ("rms",),
    "scale_embeddings": (True,),
    "attention_bias": ("none",),
    "partial_rotary_factor": (1.0,),
    "hidden_act": (TANH_GELU,),
}
SWIGLU = {**SEQUENTIAL, "scale_embeddings": (False,), "hidden_act": ("silu",)}
LLAMA = {**SWIGLU, "norm": ("rms",)}
STABLELM = {**SWIGLU, "norm": ("layer",), "head_dim": (HEADS_FILL,)}
PHI2 = {
    "norm": ("layer",),
    "scale_embeddings": (False,),
    "attention_bias": ("all",),
    "parallel_block": (True,),
    "gated": (False,),
    "hidden_act": (TANH_GELU,),
    "head_dim": (HEADS_FILL,),
    "shortcut_size": (0,),
}
WHOLE_HEADS = {"partial_rotary_factor": (1.0,)}


def _native(name: str, takes: Mapping[str, tuple[Any, ...]], scales_inputs: bool = False) -> Architecture:
    return Architecture(
        name, {**takes, **DENSE}, partial(native.native_model, name), blocks.matrix_names, scales_inputs=scales_inputs
    )


ARCHITECTURES = (
    _native("gemma", {**GEMMA, "tie_word_embeddings": (True,)}, scales_inputs=True),
    Architecture(
        "gemma4",
        {**GEMMA, **EXPERTS, "moe.norm_topk_prob": (True,)},
        gemma4.gemma4_model,
        partial(blocks.matrix_names, first=1),  # behind the layer that only scales
        gemma4.zero_matrices,
    ),
    _native("llama", {**LLAMA, **WHOLE_HEADS, "attention_bias": ("none", "all")}),
    _native("qwen2", {**LLAMA, **WHOLE_HEADS, "attention_bias": ("qkv",), "head_dim": (HEADS_FILL,)}),
    Architecture(
        "step35",
        {**LLAMA, **EXPERTS, "attention_bias": ("none", "qkv")},
        step35.step35_model,
        blocks.matrix_names,
        step35.zero_matrices,
    ),
    _native("stablelm", {**STABLELM, "attention_bias": ("none", "qkv")}),
    Architecture(
        "phimoe",
        {**STABLELM, **EXPERTS, "moe": ("experts",), "moe.norm_topk_prob": (True,), "moe.expert_size": (0,)},
        phimoe.phimoe_model,
        phimoe.matrix_names,
        centred=True,
    ),
    _native("phi2", PHI2),
)


def find_architecture(text: TextConfig) -> Architecture:
    """The architecture that a decoder is written as.

    Raises:
        UserError: no architecture that is used here can be this decoder; the message names the key that keeps the
            nearest one from it.
    """
    has = traits(text)
    misfits = {
        each.name: [key for key in has if key in each.takes and has[key] not in each.takes[key]]
        for each in ARCHITECTURES
    }
    # Of two with as many misfits the one is nearer whose first comes later: ``traits`` begins with what weighs most.
    order = list(has)
    nearest = min(
        ARCHITECTURES, key=lambda each: (len(misfits[each.name]), [-order.index(m) for m in misfits[each.name]])
    )
    if misfits[nearest.name]:
        key = misfits[nearest.name][0]
        wanted = " or ".join(repr(value) for value in nearest.takes[key])
        raise UserError(
            f"text_config.{key}: {has[key]!r} cannot be written as GGUF: of llama.cpp's architectures {nearest.name!r} "
            f"comes nearest, and it has {wanted} there; convert to a model folder instead"
        )
    return nearest


def text_model(config: ModelConfig, tensors: Mapping[str, Tensor], *, arch: str | None = None) -> GGUFModel:
    """The decoder as llama.cpp runs it; tokenizer and general keys are not in it.

    Args:
        config: the model's config.
        tensors: its tensors by gm-mlx's names, none of them quantized.
        arch: the architecture, one that can be this decoder; by default the first that can. A dense model in two is
            how the cost of a re-expression is measured.

    Raises:
        UserError: llama.cpp cannot express the decoder exactly.
    """
    text = config.text_config
    found = find_architecture(text)
    if arch is not None:
        found = next(each for each in ARCHITECTURES if each.name == arch)
    return found.write(text, tensors)


def first_block(text: TextConfig) -> int:
    """The block of a GGUF file that is the decoder's layer 0; a ``gemma4`` has another one in front."""
    return min(int(name.split(".")[1]) for name in matrix_names(text).values())


def matrix_names(text: TextConfig) -> dict[str, str]:
    """The name in a GGUF file of each linear of the decoder's layers, by our path of it."""
    return find_architecture(text).matrix_names(text)
