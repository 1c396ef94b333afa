"""The decoder, with dense or sparse feed-forward layers in one block class.

Gemma-1 (GemmaModel in transformers) is what LLaVA-GM is made of; ``TextConfig`` says how the other families differ.
What is special in Gemma-1 (see the parity tests for each):
- RMSNorm multiplies by (1 + weight), in float32;
- token embeddings are multiplied by sqrt(hidden_size), rounded to the activation dtype;
- the feed-forward network is a GeGLU with the tanh GELU; head_dim is a number of its own; the head is tied.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gm_mlx._mlx_lm import create_attention_mask, scaled_dot_product_attention
from gm_mlx.config import TextConfig
from gm_mlx.evf import ElasticFFN
from gm_mlx.moe import SparseMLP, make_mlp
from gm_mlx.pangu import AugmentedShortcut
from gm_mlx.router import Positions, Routing

Cache = list[Any]  # one mlx-lm cache object per layer


class RMSNorm(nn.Module):
    """RMSNorm whose weights are the factors (LlamaRMSNorm), or their offsets from one (GemmaRMSNorm)."""

    def __init__(self, size: int, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.weight = mx.zeros((size,)) if plus_one else mx.ones((size,))
        self.eps = eps
        self.offset = 1.0 if plus_one else 0.0

    def __call__(self, x: mx.array) -> mx.array:
        # 1 + weight in half precision would lose the weight's low bits, so the sum is made in float32.
        return mx.fast.rms_norm(x, self.offset + self.weight.astype(mx.float32), self.eps).astype(x.dtype)


def make_norm(config: TextConfig) -> nn.Module:
    """The norm that the config asks for."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)


class Attention(nn.Module):
    """Causal attention with shared key/value heads and rotary positions (GemmaAttention, LlamaAttention)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = dim**-0.5
        bias = config.attention_bias != "none"
        self.q_proj = nn.Linear(size, self.num_heads * dim, bias=bias)
        self.k_proj = nn.Linear(size, self.num_kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(size, self.num_kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * dim, size, bias=config.attention_bias == "all")
        self.rope = nn.RoPE(config.rotary_dim, traditional=False, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.num_heads, -1).swapaxes(1, 2)  # [B, H, L, Dh]
        k = self.k_proj(x).reshape(batch, length, self.num_kv_heads, -1).swapaxes(1, 2)  # [B, Hkv, L, Dh]
        v = self.v_proj(x).reshape(batch, length, self.num_kv_heads, -1).swapaxes(1, 2)
        offset = cache.offset if cache is not None else 0
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = self.attend(q, k, v, mask, cache)  # [B, H, L, Dh]
        return self.o_proj(y.swapaxes(1, 2).reshape(batch, length, -1))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None, cache: Any) -> mx.array:
        """What queries [B, H, L, Dh] find in keys and values [B, Hkv, S, Dh]: [B, H, L, Dh]."""
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)  # type: ignore[arg-type]


# By ``MoEConfig.kind``: what stands in the place of a sparse layer's FFN.
SPARSE_NETWORKS = {"experts": SparseMLP, "evf": ElasticFFN}


class Block(nn.Module):
    """A pre-norm decoder layer (GemmaDecoderLayer, PhiDecoderLayer); the config says whether its FFN is sparse."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        if not config.parallel_block:
            self.post_attention_layernorm = make_norm(config)
        if config.shortcut_size and layer >= config.series_layers:
            self.attn_linear = AugmentedShortcut(config)
        moe = config.moe if layer in config.sparse_layers else None
        self.mlp = make_mlp(config, layer) if moe is None else SPARSE_NETWORKS[moe.kind](config, moe, layer)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any = None,
        trace: list[Routing] | None = None,
        positions: Positions | None = None,
    ) -> mx.array:
        h = self.input_layernorm(x)
        attended = self.self_attn(h, mask, cache)
        x = x + attended
        if "attn_linear" in self:
            x = x + self.attn_linear(attended)
        if "post_attention_layernorm" in self:
            h = self.post_attention_layernorm(x)
        sparse = isinstance(self.mlp, SparseMLP | ElasticFFN)
        return x + (self.mlp(h, trace, positions) if sparse else self.mlp(h))


def call_block(block: Block, *inputs: Any) -> mx.array:
    """How a stack calls its blocks; ``train.checkpointing`` has another way, which takes less memory."""
    return block(*inputs)


class DecoderStack(nn.Module):
    """Embeddings, blocks and the last norm (GemmaModel)."""

    call_block = staticmethod(call_block)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config, i) for i in range(config.num_hidden_layers)]
        self.norm = make_norm(config)

    def __call__(
        self,
        x: mx.array,
        cache: Cache | None = None,
        trace: list[Routing] | None = None,
        positions: Positions | None = None,
    ) -> mx.array:
        """Hidden states [B, L, D] of embeddings [B, L, D], normalised and ready for the head."""
        caches = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, caches[0])
        for block, block_cache in zip(self.layers, caches, strict=True):
            x = self.call_block(block, x, mask, block_cache, trace, positions)
        return self.norm(x)


class LanguageModel(nn.Module):
    """The decoder with its head (GemmaForCausalLM)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.model = DecoderStack(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations. A norm tells it: the dtype of a quantized weight is that of its packing."""
        return self.model.norm.weight.dtype

    @property
    def embedding_scale(self) -> mx.array:
        """Gemma's sqrt(hidden_size), rounded to the activation dtype as transformers does since 4.39; else one."""
        return mx.array(self.scale, dtype=self.dtype)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled token embeddings [B, L, D] of ids [B, L]."""
        return self.model.embed_tokens(ids).astype(self.dtype) * self.embedding_scale

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [B, L, V] of hidden states [B, L, D]. 256,000 wide in Gemma: pass the rows that are needed."""
        return self.lm_head(hidden) if "lm_head" in self else self.model.embed_tokens.as_linear(hidden)
