"""Gradient checkpointing: of each decoder block its input is kept, and the rest is computed again for the gradients.

``mx.checkpoint`` is close to this and not used:

- it draws other numbers the second time, so that dropout would drop other inputs than those the output came from;
- it frees nothing where layers evaluate their input, as those of ``gm_mlx.cpu`` do: what is evaluated while MLX follows
  a gradient keeps all that it came from;
- where nothing is evaluated, it leaves the gradients of parameters to the end, and keeps what they are computed from:
  two thirds of what checkpointing is to save (docs/benchmarks.md, "LoRA memory").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from gm_mlx.cpu import released
from gm_mlx.decoder import Block, DecoderStack
from gm_mlx.router import Positions, Routing
from gm_mlx.weights import runs_on_cpu


@contextmanager
def checkpointed_blocks(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within the block, the decoders in ``model`` compute with gradient checkpointing while they are trained."""
    stacks = [module for module in model.modules() if isinstance(module, DecoderStack)] if on else []
    for stack in stacks:
        stack.call_block = checkpointed
    try:
        yield
    finally:
        for stack in stacks:
            del stack.call_block


def checkpointed(
    block: Block,
    x: mx.array,
    mask: mx.array | str | None,
    cache: Any = None,
    trace: list[Routing] | None = None,
    positions: Positions | None = None,
) -> mx.array:
    """``block(x, mask, cache, trace, positions)`` with little memory; takes the place of ``decoder.call_block``."""
    if not block.training or cache is not None:
        return block(x, mask, cache, trace, positions)
    named: list[tuple[str, mx.array]] = tree_flatten(block.trainable_parameters())  # type: ignore[assignment]
    names, parameters = [name for name, _ in named], [parameter for _, parameter in named]
    seed = _random_state()
    routed: list[tuple[int, list[str]]] = []  # of each routing its layer, and which arrays it has
    # On a GPU all is lazy, and evaluating would only hold it up.
    release = released if runs_on_cpu() else list

    def run(x: mx.array, *parameters: mx.array) -> list[mx.array]:
        mx.random.seed(seed)
        block.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        # Not kept beyond this function: an evaluated routing has the attention that it came from behind it.
        routings: list[Routing] = []
        y = block(x, mask, None, routings, positions)
        routed[:] = [(routing.layer, list(_arrays(routing))) for routing in routings]
        # Of an output that is itself a stop_gradient, MLX would take the next one's gradient.
        return [y, *(mx.contiguous(array) for routing in routings for array in _arrays(routing).values())]

    @mx.custom_function
    def call(*inputs: mx.array) -> list[mx.array]:
        return release(run(*inputs))

    @call.vjp
    def backward(inputs: Any, gradients: Any, outputs: Any) -> Any:
        # Nothing is computed again before the blocks behind this one are done with.
        inputs = mx.depends(list(inputs) if parameters else [inputs], [*outputs, *gradients])
        of_x, *others = release(mx.vjp(run, inputs, list(gradients))[1])
        # The blocks before this one wait for all of its gradients.
        return [*mx.depends([of_x], others), *others] if others else [of_x]

    outputs: list[mx.array] = call(x, *parameters)  # type: ignore[assignment]
    if trace is not None:
        left = iter(outputs[1:])
        trace += [Routing(layer, **{name: next(left) for name in names}) for layer, names in routed]
    return outputs[0]


def _random_state() -> int:
    """The seed that makes MLX draw what it would draw now."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return high << 32 | low


def _arrays(routing: Routing) -> dict[str, Any]:
    return {name: part for name, part in routing._asdict().items() if isinstance(part, mx.array)}
