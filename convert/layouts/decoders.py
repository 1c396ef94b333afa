"""The decoder families that can be converted, each a table, and those that are only known by name.

A family's ``defaults`` are the defaults of its class in transformers, which fill what a ``config.json`` leaves out:
Hugging Face's LLaVA writes into ``text_config`` only what differs from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gm_mlx.source_names import BUFFERS, Names

# Fields of TextConfig, and what a decoder's config.json calls them.
LLAMA_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
}
LLAMA_NAMES: Names = (
    *BUFFERS,
    (r"language_model\.(model\.(?:embed_tokens|layers\.\d+|norm)\..*|lm_head\..*)", r"language_model.\1"),
)
# Config keys, each with the values with which the model is the one that is built here.
LLAMA_REFUSED: dict[str, tuple[object, ...]] = {
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1),
    "use_bidirectional_attention": (None, False),
}


@dataclass(frozen=True)
class Decoder:
    """A family of decoders.

    Attributes:
        title: its name.
        model_type: a pattern of ``model_type``, without the "llava_" or "moe_llava_" before it.
        names: tensors, as a ``Layout`` has renamed them, and gm-mlx's names.
        fixed: fields of TextConfig that all models of the family share.
        defaults: what transformers assumes for keys that ``config.json`` leaves out; None is "not given".
        tied: whether the head is the embedding when ``config.json`` does not say.
        activation: the FFN's, when ``config.json`` does not say.
        keys: fields of TextConfig and what the family's ``config.json`` calls them.
        refused: config keys, each with the values with which a model can be converted.
    """

    title: str
    model_type: str
    names: Names
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    tied: bool
    activation: str
    keys: Mapping[str, str]
    refused: Mapping[str, tuple[object, ...]]


GEMMA = Decoder(
    title="Gemma",
    model_type="gemma",
    names=LLAMA_NAMES,
    fixed={"norm_plus_one": True, "scale_embeddings": True},
    defaults={
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
    },
    tied=True,
    activation="gelu_pytorch_tanh",
    keys=LLAMA_KEYS,
    refused=LLAMA_REFUSED,
)
LLAMA = Decoder(
    title="Llama",
    model_type="llama|vicuna|",  # the first LLaVA calls itself "llava" and nothing more
    names=LLAMA_NAMES,
    fixed={"norm_plus_one": False, "scale_embeddings": False},
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
    },
    tied=False,
    activation="silu",
    keys=LLAMA_KEYS,
    refused=LLAMA_REFUSED,
)
MISTRAL = Decoder(
    title="Mistral",
    model_type="mistral",
    names=LLAMA_NAMES,
    fixed=LLAMA.fixed,
    defaults={
        **LLAMA.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    tied=False,
    activation="silu",
    keys=LLAMA_KEYS,
    refused=LLAMA_REFUSED,
)
DECODERS = (GEMMA, LLAMA, MISTRAL)


@dataclass(frozen=True)
class Unsupported:
    """A family that is recognised and refused: by its ``model_type``, or by a tensor that no other family has."""

    title: str
    model_type: str
    tensor: str


# The order counts: a later family's tensor may be in an earlier one too.
UNSUPPORTED = (
    Unsupported("LLaVA-1.6 (any resolution)", r"next(?:_.*)?", r"(?:.*\.)?image_newline"),
    Unsupported(
        "Eve (PanGu)", r"zhizi", r".*\.attn_linear\..*|.*\.gate_proj2\..*|.*image_spatial_proj\.(?:model|mlp)\..*"
    ),
    Unsupported("MPT", r"mpt", r".*\btransformer\.blocks\..*"),
    Unsupported("Qwen", r"qwen", r".*\btransformer\.h\.\d+\.attn\.c_attn\..*"),
    Unsupported("Phi", r"phi.*", r".*\.layers\.\d+\.self_attn\.dense\..*"),
    Unsupported("StableLM", r"stablelm.*", r".*\.layers\.\d+\.input_layernorm\.bias"),
    Unsupported("MiniCPM", r"minicpm.*", r"(?!)"),
    Unsupported("Qwen1.5", r"qwen(?:1_5|2.*|3.*)", r"(?!)"),
)
