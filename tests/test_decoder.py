"""The decoder families against Hugging Face's own classes, at tiny random sizes in float32."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch_reference import TEXT, randomise, relative_error
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from gm_mlx._mlx_lm import KVCache
from gm_mlx.config import MoEConfig, TextConfig
from gm_mlx.decoder import LanguageModel
from gm_mlx.errors import UserError
from gm_mlx.moe import SparseMLP

SWIGLU = replace(TEXT, norm_plus_one=False, scale_embeddings=False, hidden_act="silu", tie_word_embeddings=False)
ONE_WIDTH = {"head_dim": 8, "num_key_value_heads": 4}  # these families derive the head's width from the hidden size
LAYER_NORM: dict[str, Any] = {"norm": "layer", "rms_norm_eps": 1e-5, **ONE_WIDTH}

FAMILIES: dict[str, tuple[TextConfig, Any, Any, dict[str, Any]]] = {
    "llama": (SWIGLU, LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "rms_norm_eps": 1e-6}),
    "mistral": (
        SWIGLU,
        MistralConfig,
        MistralForCausalLM,
        {"head_dim": 16, "rms_norm_eps": 1e-6, "sliding_window": None},
    ),
    "qwen2": (replace(SWIGLU, attention_bias="qkv", **ONE_WIDTH), Qwen2Config, Qwen2ForCausalLM, {}),
    "stablelm": (
        replace(SWIGLU, attention_bias="qkv", partial_rotary_factor=0.25, **LAYER_NORM),
        StableLmConfig,
        StableLmForCausalLM,
        {"use_qkv_bias": True, "partial_rotary_factor": 0.25},
    ),
    "phi": (
        replace(
            SWIGLU,
            attention_bias="all",
            partial_rotary_factor=0.5,
            parallel_block=True,
            gated=False,
            hidden_act="gelu_pytorch_tanh",
            **LAYER_NORM,
        ),
        PhiConfig,
        PhiForCausalLM,
        {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    ),
}
PHI_NAMES = {"self_attn.dense": "self_attn.o_proj", "model.final_layernorm": "model.norm"}


def pair(family: str) -> tuple[LanguageModel, Any]:
    """Our decoder and Hugging Face's, with the same weights."""
    config, theirs, kind, options = FAMILIES[family]
    common = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    torch.manual_seed(0)
    reference = randomise(kind(theirs(**{**common, **options})))
    if family == "phi":  # MoE-LLaVA builds Phi's head without its bias
        reference.lm_head.bias.data.zero_()
    weights = []
    for name, tensor in reference.state_dict().items():
        for at, to in PHI_NAMES.items():
            name = name.replace(at, to)
        if name != "lm_head.bias":
            weights.append((name, mx.array(tensor.numpy())))
    model = LanguageModel(config)
    model.load_weights(weights, strict=True)
    return model, reference


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_face(family: str) -> None:
    model, reference = pair(family)
    ids = np.random.default_rng(1).integers(0, 80, (2, 9))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids)).logits
    ours = model.logits(model.model(model.embed(mx.array(ids))))
    assert relative_error(ours, theirs) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_nothing(family: str) -> None:
    model, _ = pair(family)
    x = model.embed(mx.array(np.random.default_rng(1).integers(0, 80, (1, 9))))
    whole = model.model(x)
    cache = [KVCache() for _ in model.model.layers]
    parts = [model.model(x[:, :4], cache), *(model.model(x[:, i : i + 1], cache) for i in range(4, 9))]
    assert relative_error(mx.concatenate(parts, axis=1), np.array(whole)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 40])  # tokens are sorted by expert from 64 assignments up
def test_equal_experts_are_the_dense_network(family: str, length: int) -> None:
    """Whatever the router says, weights that sum to one over equal experts give what one of them gives."""
    config = FAMILIES[family][0]
    sparse = SparseMLP(replace(config, moe=MoEConfig()), MoEConfig(), layer=0)
    dense = pair(family)[0].model.layers[0].mlp
    for path in ("fc1", "fc2") if not config.gated else ("gate_proj", "up_proj", "down_proj"):
        for name, array in dense[path].parameters().items():
            sparse.switch_mlp[path][name] = mx.repeat(array[None], 4, axis=0)
    x = mx.random.normal((1, length, config.hidden_size), key=mx.random.key(0))
    assert relative_error(sparse(x), np.array(dense(x))) <= 1e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm", "batch"), ("attention_bias", "some"), ("partial_rotary_factor", 0.0), ("partial_rotary_factor", 0.2)],
)
def test_a_decoder_that_cannot_be_built_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=re.escape(f"text_config.{key}")):
        replace(TEXT, **{key: value})
