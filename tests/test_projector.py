"""LDP and LDPv2 against PyTorch, and how many tokens they make."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from eve_models import CONFIG
from eve_reference import LDP, SQUEEZED, LDPv2
from mlx.utils import tree_flatten
from torch_reference import randomise, relative_error

from gm_mlx.config import ModelConfig, VisionConfig, squeezed_size
from gm_mlx.convert.translate import _convolution
from gm_mlx.errors import UserError
from gm_mlx.projector import make_projector, pooling_matrix
from gm_mlx.source_names import LLAVA, renamed
from gm_mlx.tensors import Tensor
from gm_mlx.weights import quantizable_layers

SIZE, VISION_SIZE = 64, 64
KINDS = {
    "ldpnet": lambda: LDP(VISION_SIZE, SIZE, SQUEEZED[SIZE]),
    "ldpnetv2": lambda: LDPv2(VISION_SIZE, SIZE),
}


def config_of(kind: str, grid: int) -> ModelConfig:
    vision = replace(CONFIG.vision_config, image_size=8 * grid)
    return replace(CONFIG, projector_type=kind, vision_config=vision)


def pair(kind: str, grid: int) -> tuple[mlx_nn.Module, torch.nn.Module]:
    """Our projector and PyTorch's with the same weights, which take their names from MobileVLM's."""
    torch.manual_seed(0)
    reference = randomise(KINDS[kind]())
    ours = make_projector(config_of(kind, grid))
    weights = []
    for name, tensor in reference.state_dict().items():
        new = renamed(f"model.mm_projector.{name}", LLAVA)
        assert new is not None
        value = Tensor("F32", tuple(tensor.shape), lambda tensor=tensor: mx.array(tensor.numpy()))  # type: ignore[misc]
        array = (_convolution(value) if tensor.ndim == 4 else value).read()
        weights.append((new.removeprefix("multi_modal_projector."), array))
    ours.load_weights(weights, strict=True)
    return ours, reference


# 24 x 24 patches are CLIP-L's at 336 pixels and SigLIP-L's at 384, 27 x 27 are those of SigLIP-so400m.
TOKENS = [("ldpnet", 24, 144), ("ldpnet", 27, 196), ("ldpnet", 3, 4), ("ldpnetv2", 24, 144), ("ldpnetv2", 27, 144),
          ("ldpnetv2", 5, 144)]  # fmt: skip


@pytest.mark.parametrize(("kind", "grid", "tokens"), TOKENS)
def test_equals_pytorch(kind: str, grid: int, tokens: int) -> None:
    ours, reference = pair(kind, grid)
    x = np.random.default_rng(1).normal(size=(2, grid**2, VISION_SIZE)).astype(np.float32)
    given = ours(mx.array(x))
    with torch.no_grad():
        wanted = reference(torch.from_numpy(x))
    assert given.shape == (2, tokens, SIZE) and config_of(kind, grid).num_image_tokens == tokens
    assert relative_error(given, wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_pytorch(kind: str) -> None:
    ours, reference = pair(kind, 6)
    x = np.random.default_rng(1).normal(size=(1, 36, VISION_SIZE)).astype(np.float32)
    gradients = mlx_nn.value_and_grad(ours, lambda x: ours(x).square().sum())(mx.array(x))[1]
    reference(torch.from_numpy(x)).square().sum().backward()
    found = dict(tree_flatten(gradients))
    for name, parameter in reference.named_parameters():
        new = str(renamed(f"model.mm_projector.{name}", LLAVA)).removeprefix("multi_modal_projector.")
        assert parameter.grad is not None
        wanted = parameter.grad.numpy()
        if wanted.ndim == 4:
            wanted = wanted.transpose(0, 2, 3, 1)
        given = found.pop(new)
        assert relative_error(given, wanted.reshape(given.shape)) <= 1e-4, name
    assert not found


def test_pooling_that_does_not_divide() -> None:
    """Each average counts whole rows and columns, some of them twice."""
    matrix = pooling_matrix(27, 12)
    assert matrix.sum(axis=1) == pytest.approx(np.ones(12))
    assert set((matrix > 0).sum(axis=0)) == {1, 2} and set((matrix > 0).sum(axis=1)) == {3}


def test_channels_of_the_squeeze_are_torchvision_s() -> None:
    """_make_divisible(size // 4, 8): 7 would be rounded to 8, and 44 down to 40 but for the tenth."""
    assert {size: squeezed_size(size) for size in SQUEEZED} == SQUEEZED
    assert [squeezed_size(size) for size in (32, 48, 80, 176, 2560)] == [8, 16, 24, 48, 640]


@pytest.mark.parametrize("kind", KINDS)
def test_depthwise_convolutions_are_never_quantized(kind: str) -> None:
    paths = quantizable_layers(make_projector(config_of(kind, 24)))  # type: ignore[arg-type]
    assert "linear_1" in paths and not any("depthwise" in path or "peg" in path for path in paths)


CLIP = VisionConfig("clip_vision_model", 32, 64, 2, 2, image_size=16, patch_size=8)
REFUSED = [
    ({"vision_feature_select_strategy": "default"}, "projector_type: 'ldpnet' reads a grid of patches"),
    ({"spatial_pool_stride": 2}, "spatial_pool_stride: 2, but 'ldpnet' makes fewer tokens itself"),
    ({"projector_type": "resampler"}, "projector_type: 'resampler' is not one of"),
    ({"vision_config": CLIP}, "projector_type: 'ldpnet' reads a grid of patches"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_no_grid_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)
