"""Projectors for mtmd: LLaVA's ``mlp``, and MobileVLM's ``ldp`` and ``ldpv2``.

**Fewer image tokens.** mtmd's ``ldpv2`` is the two-layer MLP, 2 x 2 average pooling of a 24 x 24 grid, and a depthwise
convolution that is added to its input. With a convolution of zeros it is LLaVA's projector followed by pooling. For 24
x 24 patches it is LDPv2, whose adaptive pooling takes squares of 2 x 2 then.

**LDP's norms.** mtmd computes them with the tower's eps, and LDP's own is 1e-5. Each of them stands behind a
convolution without a bias: where that is a times as large, an eps acts like eps / a^2. So for a = sqrt(eps / 1e-5) the
norm is what it should be.

Kernels of depthwise convolutions are float16 in any file: llama.cpp's CPU backend stops the program at float32 ones.
mtmd has one GELU, of the tanh kind, where LLaVA's projector has the exact one: they differ by less than 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.phimoe import centred
from gm_mlx.convert.to_gguf.pieces import Piece, changed, channels_first, constant, pair
from gm_mlx.convert.to_gguf.text import find_architecture
from gm_mlx.tensors import Tensor

GRID, POOLING = 24, 2  # side of the grid that ldp and ldpv2 read, and how much smaller they make it: fixed in mtmd
LDP_EPS = 1e-5  # of LDP's norms (timm's LayerNormAct2d)
PROJECTOR = "multi_modal_projector"


def projector_pieces(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[str, list[Piece]]:
    """mtmd's name of the projector and its tensors.

    Args:
        config: a model that ``vision.check_vision`` has let pass.
        tensors: its tensors by gm-mlx's names.
    """
    kind = config.projector_type if config.spatial_pool_stride == 1 else "pooled"
    if find_architecture(config.text_config).centred:
        # Features have no mean over their channels then, and neither have averages of them.
        last = [f"{PROJECTOR}.linear_2.{part}" for part in ("weight", "bias")]
        tensors = {**tensors, **{name: centred(tensors[name], 0) for name in last}}
    name, pieces = KINDS[kind]
    return name, pieces(config, tensors, _feature_scale(config))


def _mlp(config: ModelConfig, tensors: Mapping[str, Tensor], scale: float) -> list[Piece]:
    return _linears("mm.0", "mm.2", tensors, scale)


def _pooled(config: ModelConfig, tensors: Mapping[str, Tensor], scale: float) -> list[Piece]:
    size = config.text_config.hidden_size
    kernel = Piece("mm.model.peg.0.weight", constant(0, size, 1, 3, 3), "F16")
    bias = Piece("mm.model.peg.0.bias", constant(0, size), "F32")
    return [*_linears("mm.model.mlp.0", "mm.model.mlp.2", tensors, scale), kernel, bias]


def _ldpv2(config: ModelConfig, tensors: Mapping[str, Tensor], scale: float) -> list[Piece]:
    # The convolution reads what is scaled already.
    kernel = Piece("mm.model.peg.0.weight", channels_first(tensors[f"{PROJECTOR}.peg.weight"]), "F16")
    bias = Piece("mm.model.peg.0.bias", _times(tensors[f"{PROJECTOR}.peg.bias"], scale), "F32")
    return [*_linears("mm.model.mlp.0", "mm.model.mlp.2", tensors, scale), kernel, bias]


def _ldp(config: ModelConfig, tensors: Mapping[str, Tensor], scale: float) -> list[Piece]:
    pieces = _linears("mm.model.mlp.1", "mm.model.mlp.3", tensors, 1)
    growth = math.sqrt(config.vision_config.layer_norm_eps / LDP_EPS)
    for i in (0, 1):
        ours, theirs = f"{PROJECTOR}.blocks.{i}", f"mm.model.mb_block.{i + 1}.block"
        depthwise = channels_first(_times(tensors[f"{ours}.depthwise.weight"], growth))
        pieces += [
            Piece(f"{theirs}.0.0.weight", depthwise, "F16"),
            *pair(f"{theirs}.0.1", tensors, f"{ours}.norm_1", norm=True),
            *pair(f"{theirs}.1.fc1", tensors, f"{ours}.squeeze.fc1"),
            *pair(f"{theirs}.1.fc2", tensors, f"{ours}.squeeze.fc2"),
            Piece(f"{theirs}.2.0.weight", _times(tensors[f"{ours}.pointwise.weight"], growth)),
        ]
        last = pair(f"{theirs}.2.1", tensors, f"{ours}.norm_2", norm=True)
        pieces += [replace(piece, tensor=_times(piece.tensor, scale)) for piece in last] if i else last
    return pieces


# By the projector's type: mtmd's name, and what makes its tensors.
KINDS: dict[str, tuple[str, Callable[[ModelConfig, Mapping[str, Tensor], float], list[Piece]]]] = {
    "mlp2x_gelu": ("mlp", _mlp),
    "pooled": ("ldpv2", _pooled),
    "ldpnet": ("ldp", _ldp),
    "ldpnetv2": ("ldpv2", _ldpv2),
}


def _linears(first: str, second: str, tensors: Mapping[str, Tensor], scale: float) -> list[Piece]:
    """The two layers that all projectors have; what the second gives is multiplied by ``scale``."""
    last = pair(second, tensors, f"{PROJECTOR}.linear_2")
    scaled = [replace(piece, tensor=_times(piece.tensor, scale)) for piece in last]
    return [*pair(first, tensors, f"{PROJECTOR}.linear_1"), *scaled]


def _feature_scale(config: ModelConfig) -> float:
    """What image features are multiplied by, so that they enter the first layer as they do in the model.

    llama.cpp multiplies all that enters a ``gemma`` by sqrt(n_embd), and of what enters a ``gemma4`` only tokens.
    """
    root = math.sqrt(config.text_config.hidden_size)
    wanted = root if config.scale_image_features else 1.0
    return wanted / (root if find_architecture(config.text_config).scales_inputs else 1.0)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else changed(tensor, lambda values: values * factor)
