"""``gm_mlx.engine.Sampling`` as a chain of llama.cpp's samplers.

The order is that of ``gm_mlx.generate``: tokens that are never chosen, the penalty, then top-p, min-p and top-k on the
probabilities as they are, and the temperature last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gm_mlx.engine import Sampling
from gm_mlx.llama.binding import library
from gm_mlx.llama.context import Context

RANDOM = 2**32 - 1  # as a seed it means another one each time
COLDEST = 1e-6  # a temperature at which nothing but the likeliest token is ever drawn; logits divided by less overflow


class Sampler:
    """Chooses tokens of one answer.

    Args:
        sampling: how.
        vocab_size: tokens that the model has logits for.
        banned: tokens that are never chosen.
        history: ids of the prompt, for the penalty; image positions are left out.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, banned: Sequence[int], history: Sequence[int]) -> None:
        self._c = c = library()
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for sampler in _samplers(c, sampling, vocab_size, banned):
            c.llama_sampler_chain_add(self._chain, sampler)
        if sampling.repetition_penalty != 1:
            refused = set(banned)
            seen = [token for token in history if 0 <= token < vocab_size and token not in refused]
            for token in seen[-sampling.repetition_context :]:
                c.llama_sampler_accept(self._chain, token)

    def choose(self, context: Context) -> int:
        """The token after the last one that was computed."""
        return self._c.llama_sampler_sample(self._chain, context.handle, -1)

    def close(self) -> None:
        """Give the memory back."""
        if self._chain:
            self._c.llama_sampler_free(self._chain)
        self._chain = None


def _samplers(c: Any, sampling: Sampling, vocab_size: int, banned: Sequence[int]) -> list[Any]:
    chain = []
    if banned:
        bias = (c.llama_logit_bias * len(banned))()
        for entry, token in zip(bias, banned, strict=True):
            entry.token, entry.bias = token, float("-inf")
        chain.append(c.llama_sampler_init_logit_bias(vocab_size, len(banned), bias))
    if sampling.repetition_penalty != 1:
        penalty = (vocab_size, sampling.repetition_context, sampling.repetition_penalty, 0.0, 0.0)
        chain.append(c.llama_sampler_init_penalties(*penalty))
    if sampling.temperature == 0:
        return [*chain, c.llama_sampler_init_greedy()]
    if sampling.top_p < 1:
        chain.append(c.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        chain.append(c.llama_sampler_init_min_p(sampling.min_p, 1))
    if sampling.top_k > 0:
        chain.append(c.llama_sampler_init_top_k(sampling.top_k))
    seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(4), "little")
    return [
        *chain,
        c.llama_sampler_init_temp(max(sampling.temperature, COLDEST)),
        c.llama_sampler_init_dist(seed % RANDOM),
    ]
