"""Trained weights in float32, and a model that computes with copies of them in its own dtype.

A step changes a weight by about the learning rate. bfloat16 has 8 bits of mantissa, so a change below a 256th of the
weight would be lost, and most are: what is trained is kept in float32 (Micikevicius et al. 2018, "Mixed precision
training", section 3.1). The copies are made inside the function that is differentiated, so that gradients arrive in
float32 as well.

Losses here are sums, not means, which also keeps the gradients of float16 away from zero; the paper's loss scaling
(section 3.2) does no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gm_mlx.errors import UserError
from gm_mlx.weights import DTYPES, PACKED, is_router

# LoRA's factors, which stay float32 and are cast by their layer; see gm_mlx.lora.layers.
FACTORS = ("lora_a", "lora_b", "magnitude")


class Masters:
    """What is trained of a model, in float32.

    Attributes:
        values: the weights by name, float32.
    """

    def __init__(self, model: nn.Module, precision: str = "auto") -> None:
        """Take a model's trainable parameters, and cast the frozen ones if another precision is asked for.

        Args:
            model: any; what is frozen and quantized is left as it is.
            precision: of the arithmetic: "float32", "bfloat16", "float16", or "auto" for the dtypes that the model has.

        Raises:
            UserError: there is nothing to be trained.
        """
        trained = _arrays(model.trainable_parameters())
        if not trained:
            raise UserError("there is nothing to train: every part of the model is frozen")
        self._frozen: dict[str, mx.array] = {}  # those that are cast, as they were
        self._own = {name: array.dtype for name, array in trained.items()}
        self._used = dict(self._own)
        self._places = {name: _place(model, name) for name in trained}
        self.values = {name: array.astype(mx.float32) for name, array in trained.items()}
        if precision == "auto":
            return
        packed = {f"{path}.{name}" for path, layer in model.named_modules() if "scales" in layer for name in PACKED}
        cast: dict[str, mx.array] = {}
        for name, array in _arrays(model.parameters()).items():
            if name in packed or not mx.issubdtype(array.dtype, mx.floating):
                continue
            stays = is_router(name) or name.rpartition(".")[2] in FACTORS
            used = mx.float32 if stays else DTYPES[precision]
            if name in trained:
                self._used[name] = used
            elif array.dtype != used:
                self._frozen[name], cast[name] = array, array.astype(used)
                self._places[name] = _place(model, name)
        self._put(cast)

    def put(self, values: Mapping[str, mx.array] | None = None) -> None:
        """Let the model compute with these weights, or with ``self.values``, in its own dtypes."""
        values = self.values if values is None else values
        self._put({name: value.astype(self._used[name]) for name, value in values.items()})

    def finish(self) -> None:
        """Give the model its trained weights in the dtypes that they had, and the frozen ones as they were."""
        self._put({name: value.astype(self._own[name]) for name, value in self.values.items()} | self._frozen)

    def _put(self, arrays: Mapping[str, mx.array]) -> None:
        # What ``Module.update`` does, without finding every place again: a step does this several times.
        for name, array in arrays.items():
            owner, key = self._places[name]
            owner[key] = array


def _arrays(tree: object) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


def _place(model: nn.Module, name: str) -> tuple[Any, str | int]:
    """The module, dict or list that holds an array of a model, and the key there."""
    owner: Any = model
    *path, last = name.split(".")
    for part in path:
        owner = owner[int(part)] if isinstance(owner, list) else owner[part]
    return owner, int(last) if isinstance(owner, list) else last
