"""The loop that makes text: prefill a prompt in chunks, then decode token by token.

Three rules keep it small in memory and fast: a chunk of the prompt is computed and let go before the next one begins,
logits are made for one row only, and the GPU already computes the next token while the host looks at this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from gm_mlx._mlx_lm import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
)
from gm_mlx.decoder import Cache
from gm_mlx.engine import Sampling
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.router import Positions

KEPT_TOKENS = 4  # a rotating cache never drops the first ones: attention leans on them (arXiv 2309.17453)
KV_GROUP_SIZES = (64, 32)
CLEAR_EVERY = 256  # tokens between two returns of unused buffers to the system


def make_cache(model: Model, *, kv_bits: int | None = None, max_kv_size: int | None = None) -> Cache:
    """An empty key/value cache, one object per layer.

    Args:
        model: the model it is for.
        kv_bits: 4 or 8 to store keys and values quantized; None keeps them as computed.
        max_kv_size: most positions kept; older ones but the first few are overwritten. None keeps all.

    Raises:
        UserError: values that mlx-lm's caches do not have.
    """
    if kv_bits is not None and max_kv_size is not None:
        raise UserError("kv_bits and max_kv_size: a rotating cache cannot be quantized; give one of the two")
    if max_kv_size is not None:
        if max_kv_size <= KEPT_TOKENS:
            raise UserError(f"max_kv_size: {max_kv_size} is not above {KEPT_TOKENS}; leave it out to keep everything")
        return [RotatingKVCache(max_size=max_kv_size, keep=KEPT_TOKENS) for _ in model.layers]
    if kv_bits is None:
        return [KVCache() for _ in model.layers]
    if kv_bits not in (4, 8):
        raise UserError(f"kv_bits: {kv_bits} is not 4 or 8")
    head_dim = model.config.text_config.head_dim
    group_size = next((size for size in KV_GROUP_SIZES if head_dim % size == 0), None)
    if group_size is None:
        raise UserError(f"kv_bits: heads of {head_dim} do not divide into groups of 32; leave kv_bits out")
    return [QuantizedKVCache(group_size=group_size, bits=kv_bits) for _ in model.layers]


def trim_cache(cache: Cache, length: int) -> bool:
    """Cut every layer back to its first ``length`` positions; false when the cache cannot be cut.

    An interrupted computation may leave layers of different lengths; this makes them equal again.
    """
    for layer in cache:
        surplus = layer.offset - length
        if surplus < 0 or (surplus and not layer.is_trimmable()):
            return False
        layer.trim(surplus)
    return True


def prefill(
    model: Model,
    embeddings: mx.array,
    cache: Cache,
    chunk: int = 512,
    progress: Callable[[int, int], None] | None = None,
    positions: Positions | None = None,
) -> mx.array:
    """Feed a prompt into the cache.

    Args:
        model: the model.
        embeddings: [1, L, D] with L >= 1, from ``Model.embed``; they continue what the cache holds.
        cache: from ``make_cache``; changed in place.
        chunk: positions computed at a time, which bounds the memory.
        progress: called with positions done and in all, after each chunk.
        positions: what sparse layers may know of the embeddings.

    Returns:
        Logits [1, V] after the last position, evaluated.
    """
    length = embeddings.shape[1]
    for start in range(0, length, chunk):
        part = positions.part(start, start + chunk) if positions is not None else None
        hidden = model.hidden(embeddings[:, start : start + chunk], cache, positions=part)
        last = start + chunk >= length
        if last:
            logits = model.logits(hidden[:, -1:])[:, 0]  # [1, V]
            mx.eval(logits)
        mx.eval([layer.state for layer in cache])
        # The buffers of a chunk do not fit the next token's shapes; kept, they would double the peak.
        mx.clear_cache()
        if progress is not None:
            progress(min(start + chunk, length), length)
    return logits


def decode(
    model: Model,
    logits: mx.array,
    cache: Cache,
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    banned: Sequence[int] = (),
    history: Sequence[int] = (),
    positions: Positions | None = None,
) -> Iterator[int]:
    """Yield token ids, computing one ahead.

    A yielded token is already in the cache, but for the last of ``sampling.max_tokens``. mlx's global random state is
    neither read nor changed.

    Args:
        model: the model.
        logits: [1, V] from ``prefill``.
        cache: the cache that ``prefill`` filled.
        sampling: how tokens are chosen. A seed gives the same tokens each time on one machine and backend.
        vocab_size: ids from here on, which pad the embedding rows, are never chosen.
        banned: ids that are never chosen.
        history: ids of the prompt, for the repetition penalty; ids outside the vocabulary are left out.
        positions: what sparse layers may know of each token: ``Positions.next_token`` of the prompt's.
    """
    vocab_size = min(vocab_size or logits.shape[-1], logits.shape[-1])
    banned = [token for token in banned if 0 <= token < vocab_size]
    sampler = Sampler(sampling, [token for token in history if 0 <= token < vocab_size and token not in banned])

    def choose(logits: mx.array) -> mx.array:  # [1, V] to [1]
        logits = logits[:, :vocab_size]
        if banned:
            logits[:, mx.array(banned)] = -mx.inf
        return sampler(logits)

    token = choose(logits)
    mx.async_eval(token)
    for count in range(1, sampling.max_tokens + 1):
        if count < sampling.max_tokens:
            following = choose(model(token[None], cache, positions=positions)[:, -1])
            mx.async_eval(following)
        yield int(token.item())  # type: ignore[arg-type]
        if count < sampling.max_tokens:
            token = following
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()


class Sampler:
    """Chooses a token from logits; holds what one answer needs to remember for that: a random key and the last ids."""

    def __init__(self, sampling: Sampling, history: Sequence[int] = ()) -> None:
        self.sampling = sampling
        seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.key = mx.random.key(seed % 2**64)
        self.processors = []
        if sampling.repetition_penalty != 1.0:
            self.processors = make_logits_processors(
                repetition_penalty=sampling.repetition_penalty, repetition_context_size=sampling.repetition_context
            )
        self.recent = mx.array(list(history)[-sampling.repetition_context :], dtype=mx.uint32)

    def __call__(self, logits: mx.array) -> mx.array:
        """Token ids uint32 [1] of logits [1, V]; lazy."""
        sampling = self.sampling
        for processor in self.processors:
            logits = processor(self.recent, logits)
        if sampling.temperature == 0:
            token = mx.argmax(logits, axis=-1)
        else:
            # The filters of mlx-lm without its sampler, which draws from the global random state.
            logprobs = logits.astype(mx.float32)
            logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
            if sampling.top_p < 1:
                logprobs = apply_top_p(logprobs, sampling.top_p)
            if sampling.min_p > 0:
                logprobs = apply_min_p(logprobs, sampling.min_p)
            if 0 < sampling.top_k < logprobs.shape[-1]:
                logprobs = apply_top_k(logprobs, sampling.top_k)
            # The likeliest token stays at 0, so that no small temperature can make every logit infinite.
            logprobs = (logprobs - logprobs.max(axis=-1, keepdims=True)) / sampling.temperature
            self.key, draw = mx.random.split(self.key)
            token = mx.random.categorical(logprobs, key=draw)
        if self.processors:
            self.recent = mx.concatenate([self.recent, token])[-sampling.repetition_context :]
        return token
