"""The decoder families that can be converted, each a table, and those that are only known by name.

A family's ``defaults`` are the defaults of its class in transformers, which fill what a ``config.json`` leaves out:
Hugging Face's LLaVA writes into ``text_config`` only what differs from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gm_mlx.source_names import BUFFERS, PHI_NAMES, QWEN_NAMES, Names

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
    "scale_emb": (None, 1),  # MiniCPM
    "partial_rotary_factor": (None, 1),
    "use_bidirectional_attention": (None, False),
}
LAYER_NORM_KEYS = {**LLAMA_KEYS, "rms_norm_eps": "layer_norm_eps", "partial_rotary_factor": "partial_rotary_factor"}


@dataclass(frozen=True)
class Decoder:
    """A family of decoders.

    Attributes:
        title: its name.
        model_type: a pattern of ``model_type``, without the "llava_" or "moe_llava_" before it.
        names: tensors, as a ``Layout`` has renamed them, and gm-mlx's names.
        fixed: fields of TextConfig that all models of the family share.
        defaults: what transformers assumes for keys that ``config.json`` leaves out; None is "not given", and
            ``REQUIRED`` a key without which nothing is assumed.
        tied: whether the head is the embedding when ``config.json`` does not say.
        activation: the FFN's, when ``config.json`` does not say.
        keys: fields of TextConfig and what the family's ``config.json`` calls them.
        refused: config keys, each with the values with which a model can be converted.
        bias: the key that says whether attention has biases, whether it has when ``config.json`` does not say, and
            which it has then; None if ``fixed`` says it.
        older: keys, and what older configs call them.
        ffn_parts: how many of an FFN's matrices ``intermediate_size`` counts together.
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
    bias: tuple[str, bool, str] | None = ("attention_bias", False, "all")
    older: Mapping[str, str] = field(default_factory=dict)
    ffn_parts: int = 1


REQUIRED = "required"

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
    model_type="llama|vicuna|mobilevlm|",  # the first LLaVA calls itself "llava" and nothing more
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
# Eve's code for it is InternLM's with two kinds of layers (eve/model/language_model/zhizi); which layers are of which
# kind is seen from the tensors.
PANGU = Decoder(
    title="PanGu-pi",
    model_type="zhizi",
    names=(
        (r"language_model\.(model\.layers\.\d+\.attn_linear)\.0\.weight", r"language_model.\1.linear_1.weight"),
        (r"language_model\.(model\.layers\.\d+\.attn_linear)\.2\.weight", r"language_model.\1.linear_2.weight"),
        *LLAMA_NAMES,
    ),
    fixed=LLAMA.fixed,
    defaults={**LLAMA.defaults, "vocab_size": 103168},
    tied=False,
    activation="silu",
    keys=LLAMA_KEYS,
    refused=LLAMA_REFUSED,
    bias=("bias", True, "qkv"),
)
QWEN2 = Decoder(
    title="Qwen1.5",
    model_type="qwen1_5|qwen2",
    names=LLAMA_NAMES,
    fixed={**LLAMA.fixed, "attention_bias": "qkv"},
    defaults={
        **LLAMA.defaults,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    },
    tied=False,
    activation="silu",
    keys=LLAMA_KEYS,
    refused=LLAMA_REFUSED,
    bias=None,
)
STABLELM = Decoder(
    title="StableLM",
    model_type="stablelm|stablelm_epoch",
    names=LLAMA_NAMES,
    fixed={**LLAMA.fixed, "norm": "layer"},
    defaults={
        **LLAMA.defaults,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
    },
    tied=False,
    activation="silu",
    keys=LAYER_NORM_KEYS,
    refused={"qk_layernorm": (None, False), "use_parallel_residual": (None, False)},
    bias=("use_qkv_bias", False, "qkv"),
    older={"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_pct"},
)
PHI = Decoder(
    title="Phi",
    model_type="phi",
    names=(*PHI_NAMES, *LLAMA_NAMES),
    fixed={**LLAMA.fixed, "norm": "layer", "attention_bias": "all", "parallel_block": True, "gated": False},
    defaults={
        **LLAMA.defaults,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "vocab_size": 51200,
        "rms_norm_eps": 1e-5,
        # The default of its class, 0.5, is Phi-1's. Phi-2 has 0.4, and with another share it talks nonsense.
        "partial_rotary_factor": REQUIRED,
    },
    tied=False,
    activation="gelu_new",
    keys=LAYER_NORM_KEYS,
    refused={"qk_layernorm": (None, False)},
    bias=None,
)
# The first Qwen, whose own code MoE-LLaVA has (moellava/model/language_model/qwen). What that does to positions beyond
# ``seq_length`` (dynamic NTK, log n) does nothing before.
QWEN = Decoder(
    title="Qwen",
    model_type="qwen",
    names=(*BUFFERS, *QWEN_NAMES),
    fixed={**LLAMA.fixed, "attention_bias": "qkv"},
    defaults={
        **LLAMA.defaults,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
    },
    tied=False,
    activation="silu",
    keys={
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "head_dim": "kv_channels",
        "vocab_size": "vocab_size",
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
        "max_position_embeddings": "seq_length",
    },
    refused={"no_bias": (None, True), "rotary_pct": (None, 1), "scale_attn_weights": (None, True)},
    bias=None,
    ffn_parts=2,
)
DECODERS = (GEMMA, LLAMA, MISTRAL, PANGU, QWEN, QWEN2, STABLELM, PHI)


@dataclass(frozen=True)
class Unsupported:
    """A family that is recognised and refused: by its ``model_type``, or by a tensor that no other family has."""

    title: str
    model_type: str
    tensor: str


# The order counts: a later family's tensor may be in an earlier one too.
UNSUPPORTED = (
    Unsupported("LLaVA-1.6 (any resolution)", r"next(?:_.*)?", r"(?:.*\.)?image_newline"),
    Unsupported("MPT", r"mpt", r".*\btransformer\.blocks\..*"),
    # Llama's names, and scales of embeddings, residuals and logits that no tensor shows.
    Unsupported("MiniCPM", r"minicpm.*", r"(?!)"),
    Unsupported("Phi-3", r"phi_?3.*|phi_?moe|phi_?4.*", r".*\.self_attn\.qkv_proj\..*"),
    Unsupported("Qwen3 or a newer Qwen", r"qwen3.*|qwen2_.+", r".*\.self_attn\.q_norm\..*"),
)
