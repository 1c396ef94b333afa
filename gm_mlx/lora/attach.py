"""LoRA put on a model, and taken off: which modules are wrapped, with what, and what is trained afterwards."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from gm_mlx.inventory import COMPONENTS
from gm_mlx.lora.config import LoRAConfig, Target, choose_targets, is_embedding, lora_targets
from gm_mlx.lora.layers import LowRank, Wrapper, row_squares, wrap
from gm_mlx.model import Model

DEFAULT_ADAPTER = "default"


class Wrapped(NamedTuple):
    """A module with LoRA.

    Attributes:
        path: the module's.
        component: of ``gm_mlx.inventory``.
        shape: of its matrix; see ``Target``.
        rank: of its adapter.
        parameters: of its adapter.
    """

    path: str
    component: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


class Part(NamedTuple):
    """All that one component has of LoRA: modules, matrices in them (experts one by one), ranks and parameters."""

    component: str
    modules: int
    matrices: int
    ranks: tuple[int, ...]
    parameters: int


def add_lora(model: Model, config: LoRAConfig, seed: int = 0, adapter: str = DEFAULT_ADAPTER) -> list[Wrapped]:
    """Put fresh LoRA on a model, and leave nothing else to be trained.

    A is drawn as peft draws it, uniformly within 1 / sqrt(in), from a key of its own at each module: what a module gets
    depends on the seed and its path, and not on the other targets. B is zero, so the model says what it said before,
    to the last bit.

    Args:
        model: a model, quantized or not, that may have other adapters already.
        config: where, how large, how strong.
        seed: of A; 0 to 2**32 - 1.
        adapter: the name of what is added.

    Returns:
        What was wrapped, in the model's order.

    Raises:
        UserError: a target is nothing that the model has.
    """
    model.freeze()
    wrapped = []
    for target in choose_targets(model.config, config):
        rank, key = config.rank_of(target.path), mx.random.key(seed << 32 | zlib.crc32(target.path.encode()))
        *stack, rows, columns = target.shape
        # One column of A is all that a token sees of it; a sum over the columns is what others see.
        bound = 1.0 if is_embedding(target.path) else columns**-0.5
        low = LowRank(
            adapter,
            mx.random.uniform(-bound, bound, (*stack, rank, columns), key=key),
            mx.zeros((*stack, rows, rank)),
            config.alpha_of(target.path),
            rslora=config.rslora,
            dropout=config.dropout,
        )
        wrapper = wrapper_at(model, target.path)
        if config.dora:
            low.use_dora(row_squares(wrapper.base))
        wrapped.append(attach(wrapper, target, low))
    return wrapped


def attach(wrapper: Wrapper, target: Target, low: LowRank) -> Wrapped:
    """Let a module have one more adapter."""
    low.train(wrapper.training)
    wrapper.adapters.append(low)
    return describe(target, low)


def describe(target: Target, low: LowRank) -> Wrapped:
    """What a user is told of an adapter at one module."""
    size = sum(low[name].size for name in ("lora_a", "lora_b", "magnitude") if name in low)
    return Wrapped(target.path, target.component, target.shape, low.rank, size)


def wrapper_at(model: Model, path: str) -> Wrapper:
    """The module at a path, wrapped now unless it was wrapped before."""
    module = _module(model, path)
    if isinstance(module, Wrapper):
        return module
    wrapper = wrap(module)
    wrapper.train(module.training)
    replace_module(model, path, wrapper)
    return wrapper


def wrappers(model: Model) -> dict[str, Wrapper]:
    """All wrapped modules by path, in the model's order."""
    modules = ((path, _module(model, path)) for path in lora_targets(model.config))
    return {path: module for path, module in modules if isinstance(module, Wrapper)}


def replace_module(model: Model, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, name = path.rpartition(".")
    setattr(_module(model, parent), name, module)


def remove_lora(model: Model) -> None:
    """Take all adapters off; the model is what it was before, and stays frozen."""
    for path, wrapper in wrappers(model).items():
        replace_module(model, path, wrapper.base)


def parts(wrapped: Iterable[Wrapped]) -> list[Part]:
    """What was wrapped, summed up by component, for people to look at."""
    wrapped = list(wrapped)
    found = []
    for component in COMPONENTS:
        if own := [one for one in wrapped if one.component == component]:
            matrices = sum(one.shape[0] if len(one.shape) == 3 else 1 for one in own)
            ranks = tuple(sorted({one.rank for one in own}))
            found.append(Part(component, len(own), matrices, ranks, sum(one.parameters for one in own)))
    return found


def _module(model: Model, path: str) -> Any:
    module: Any = model
    for name in path.split("."):
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module
