"""Attention whose queries, keys and values are one matrix (timm's towers, the first Qwen), taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from gm_mlx.tensors import Tensor

QKV = ".self_attn.qkv."


def split_attention(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """All tensors, with three in the place of one where queries, keys and values were one.

    Args:
        tensors: tensors under gm-mlx's names, but for ``self_attn.qkv`` [3 D, D] and its bias [3 D].
        part: the beginning of the names that are looked at.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if QKV not in name or not name.startswith(part):
            split[name] = tensor
            continue
        rows = tensor.shape[0] // 3
        for i, letter in enumerate("qkv"):
            read = partial(_rows, tensor, i * rows, (i + 1) * rows)
            split[name.replace(QKV, f".self_attn.{letter}_proj.")] = Tensor(
                tensor.dtype, (rows, *tensor.shape[1:]), read
            )
    return split


def _rows(tensor: Tensor, start: int, stop: int) -> mx.array:
    return tensor.read()[start:stop]
