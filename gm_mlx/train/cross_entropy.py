"""The cross-entropy of many tokens over a large vocabulary, without all of their logits at a time.

A thousand learnt tokens of Gemma are a gigabyte of logits, and a backward pass has them three times. Here they are
computed piece by piece, and once more in the backward pass, which costs one product with the head.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from gm_mlx import cpu
from gm_mlx.model import Model

# Logits of a piece: 64 rows of Gemma's 256,000 columns. MLX's CPU backend holds some ten pieces, since it allocates
# what it is about to compute.
LOGITS = 2**24


def cross_entropy(model: Model, hidden: mx.array, targets: mx.array) -> mx.array:
    """Sum of the cross-entropies of tokens.

    Args:
        model: its head is used, and learns unless it is frozen.
        hidden: [M, D], of the positions that predict the tokens.
        targets: ids [M].

    Returns:
        float32 [].
    """
    language = model.language_model
    head = language.lm_head if "lm_head" in language else language.model.embed_tokens
    named: list[tuple[str, mx.array]] = tree_flatten(head.trainable_parameters())  # type: ignore[assignment]
    step = rows_at_a_time(model.config.text_config.vocab_size, sum(value.size for _, value in named))
    if len(targets) <= step:
        return _loss(model, hidden, targets)
    pieces = [slice(start, start + step) for start in range(0, len(targets), step)]
    # Fast layers evaluate their inputs, and what is evaluated while MLX follows a gradient keeps all it came from.
    release = cpu.released if cpu.is_fast(model) else list

    def piece(hidden: mx.array, *parameters: mx.array, targets: mx.array) -> mx.array:
        """The loss as a function of the head's parameters too, since MLX differentiates by arguments only."""
        head.update(tree_unflatten([(name, value) for (name, _), value in zip(named, parameters, strict=True)]))
        loss = _loss(model, hidden, targets)
        head.update(tree_unflatten(named))
        return loss

    @mx.custom_function
    def total(hidden: mx.array, *parameters: mx.array) -> mx.array:
        loss = mx.array(0.0)
        for rows in pieces:
            # Each piece waits for the one before it: else their logits might all be there at once.
            (waiting,) = mx.depends([hidden[rows]], [loss])
            (loss,) = release([loss + piece(waiting, *parameters, targets=targets[rows])])
        return loss

    @total.vjp
    def backward(
        primals: mx.array | tuple[mx.array, ...], cotangent: mx.array, output: mx.array
    ) -> mx.array | tuple[mx.array, ...]:
        hidden, *parameters = (primals,) if isinstance(primals, mx.array) else primals
        of_hidden: list[mx.array] = []
        of_parameters: list[mx.array] = []
        done = output
        for rows in pieces:
            inputs = mx.depends([hidden[rows], *parameters], [done])
            _, (gradient, *others) = mx.vjp(lambda *x, t=targets[rows]: piece(*x, targets=t), inputs, [cotangent])
            others = [other.astype(mx.float32) for other in others]
            sums = [a + b for a, b in zip(of_parameters, others, strict=True)] if of_parameters else others
            gradient, *of_parameters = release([gradient, *sums])
            of_hidden.append(gradient)
            (done,) = mx.depends([output], [gradient, *of_parameters])
        gradients = [mx.concatenate(of_hidden), *of_parameters]
        cast = [gradient.astype(value.dtype) for gradient, value in zip(gradients, (hidden, *parameters), strict=True)]
        return tuple(cast) if parameters else cast[0]

    return total(hidden, *(value for _, value in named))  # type: ignore[return-value]


def rows_at_a_time(vocab_size: int, learns: int) -> int:
    """Rows of a piece, for a head of which so many numbers learn.

    Each piece has a gradient of them. Of a head that learns as a whole, pieces smaller than it would save nothing.
    """
    return max(1, max(LOGITS, learns) // vocab_size)


def _loss(model: Model, hidden: mx.array, targets: mx.array) -> mx.array:
    logits = model.logits(hidden).astype(mx.float32)
    if cpu.is_fast(model) and (loss := cpu.cross_entropy(logits, targets)) is not None:
        return loss
    return nn.losses.cross_entropy(logits, targets, reduction="sum")
