"""What a GGUF file is made of: metadata by key, and tensors that are not read yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from gm_mlx.tensors import Tensor


@dataclass(frozen=True)
class Piece:
    """A tensor of a GGUF file.

    Attributes:
        name: its name in llama.cpp.
        tensor: its values; the shape is in NumPy's order, the reverse of ggml's.
        stored: "F32" or "F16" where it has a type of its own; None for a matrix, which has the type of the file.
    """

    name: str
    tensor: Tensor
    stored: str | None = None


@dataclass
class GGUFModel:
    """A GGUF file that is not written yet.

    Attributes:
        arch: llama.cpp's name of the architecture; keys of ``metadata`` that begin with a dot belong to it.
        metadata: bool, int (uint32), float (float32), str, and lists of one of these, by key.
        pieces: its tensors, in the order of the file.
    """

    arch: str
    metadata: dict[str, Any] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    def keys(self) -> dict[str, Any]:
        """The metadata by full keys."""
        return {f"{self.arch}{key}" if key.startswith(".") else key: value for key, value in self.metadata.items()}


def constant(value: float, *shape: int) -> Tensor:
    """A tensor of one float32 value."""
    return Tensor("F32", shape, lambda: mx.full(shape, value, mx.float32))


def changed(tensor: Tensor, change: Callable[[mx.array], mx.array]) -> Tensor:
    """A tensor of the same shape whose float32 values are ``change`` of its own."""
    return replace(tensor, dtype="F32", read=lambda: change(tensor.read().astype(mx.float32)))


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """A tensor times a number, in its own dtype; with a power of two nothing is rounded."""
    return tensor if factor == 1 else replace(tensor, read=lambda: tensor.read() * factor)


def pair(new: str, tensors: Mapping[str, Tensor], old: str, norm: bool = False) -> list[Piece]:
    """Weight and bias of a linear layer or a norm, ours by the path ``old``."""
    weight = Piece(f"{new}.weight", tensors[f"{old}.weight"], "F32" if norm else None)
    return [weight, Piece(f"{new}.bias", tensors[f"{old}.bias"], "F32")]


def channels_first(kernel: Tensor) -> Tensor:
    """MLX's kernel [out, H, W, in] as [out, in, H, W]."""
    out, height, width, channels = kernel.shape
    return Tensor(kernel.dtype, (out, channels, height, width), lambda: kernel.read().transpose(0, 3, 1, 2))
