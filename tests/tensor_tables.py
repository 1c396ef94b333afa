"""Models as the tables of tensors that converting and quantizing pass around, and back."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from gm_mlx.config import ModelConfig
from gm_mlx.model import Model
from gm_mlx.tensors import Tensor
from gm_mlx.weights import named_arrays

DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}


def tensors_of(model: Model, dtype: mx.Dtype | None = None) -> dict[str, Tensor]:
    """A model's parameters, in another dtype if one is given."""
    arrays = {name: array if dtype is None else array.astype(dtype) for name, array in named_arrays(model).items()}
    return {name: Tensor(DTYPES[a.dtype], a.shape, lambda a=a: a) for name, a in arrays.items()}


def model_of(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Model:
    """A float32 model with these parameters; each tensor is what it says it is."""
    weights = []
    for name, tensor in tensors.items():
        array = tensor.read()
        assert (DTYPES[array.dtype], array.shape) == (tensor.dtype, tensor.shape), name
        weights.append((name, array.astype(mx.float32)))
    model = Model(config)
    model.load_weights(weights)
    model.eval()
    return model
