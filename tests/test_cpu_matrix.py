"""Products with packed and plain matrices, both ways, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from torch_reference import relative_error

from gm_mlx._mlx_lm import SwitchLinear
from gm_mlx.cpu import matrix
from gm_mlx.cpu.matrix import FloatMatrix, Matrix, is_readable, matrix_of

EXACT = 3e-6
PACKINGS = [
    *({"bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)),
    {"bits": 3, "group_size": 32},
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
]


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def unpacked(layer: Any) -> np.ndarray:
    scales, biases = layer.scales, layer.get("biases")
    if biases is not None:  # MLX would else unpack to few bits
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode, "dtype": mx.float32}
    return np.array(mx.dequantize(layer.weight, scales, biases, **how), np.float64)


@pytest.fixture(params=["large", "small"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as they are, and so small that there are many, of which the last is smaller."""
    if request.param == "small":
        monkeypatch.setattr(matrix, "BLOCK", 7 * 128)
        monkeypatch.setattr(matrix, "COLUMNS", 33)


@pytest.mark.parametrize("how", PACKINGS, ids=str)
@pytest.mark.parametrize("size", [128, 384])
def test_packed(how: dict[str, Any], size: int, pieces: None) -> None:
    layer = nn.QuantizedLinear.from_linear(nn.Linear(size, 200, bias=False), **how)
    wanted, x, dy = unpacked(layer), rows(9, size), rows(9, 200)
    found = Matrix.of(layer)
    assert relative_error(mx.array(found.times(x)), x @ wanted.T) <= EXACT
    assert relative_error(mx.array(found.back(dy)), dy @ wanted) <= EXACT


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_of_several(dtype: mx.Dtype, pieces: None) -> None:
    layer = SwitchLinear(128, 200, 3, bias=False)
    layer.set_dtype(dtype)
    packed = layer.to_quantized(bits=4)
    wanted, x, dy = unpacked(packed)[1], rows(9, 128), rows(9, 200)
    found = Matrix.of(packed, 1)
    assert relative_error(mx.array(found.times(x)), x @ wanted.T) <= EXACT
    assert relative_error(mx.array(found.back(dy)), dy @ wanted) <= EXACT


@pytest.mark.parametrize("expert", [None, 1])
def test_plain(expert: int | None, pieces: None) -> None:
    layer = nn.Linear(128, 200) if expert is None else SwitchLinear(128, 200, 3)
    wanted, x, dy = np.array(layer.weight, np.float64)[... if expert is None else expert], rows(9, 128), rows(9, 200)
    found = matrix_of(layer, expert)
    assert isinstance(found, FloatMatrix)
    assert np.shares_memory(found.weight, np.asarray(layer.weight))
    assert relative_error(mx.array(found.times(x)), x @ wanted.T) <= EXACT
    assert relative_error(mx.array(found.back(dy)), dy @ wanted) <= EXACT
    assert relative_error(mx.array(found.of_weight(dy, x)), dy.T.astype(np.float64) @ x) <= EXACT


def test_which_matrices_numpy_can_multiply_with() -> None:
    plain = nn.Linear(128, 64)
    assert is_readable(plain)
    assert not is_readable(nn.LayerNorm(64))
    for how, readable in [({"bits": 4}, True), ({"mode": "mxfp4"}, True), ({"mode": "mxfp8"}, False)]:
        assert is_readable(nn.QuantizedLinear.from_linear(plain, **how)) is readable
    plain.set_dtype(mx.float16)
    assert not is_readable(plain)
    experts = SwitchLinear(128, 64, 2).to_quantized(bits=4)
    assert is_readable(experts)
    experts.unfreeze(keys=["scales"])
    assert not is_readable(experts)
