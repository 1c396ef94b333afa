"""Tower and projector for llama.cpp's vision library (mtmd): architecture ``clip``, projector ``mlp`` or ``ldpv2``.

**How many layers run.** mtmd runs a LLaVA tower to its last layer but one, and PyTorch's folders hold all layers for
it. Here the layers behind the one that is read do not exist, so the file says which hidden state is meant
(``feature_layer``), and mtmd runs to it.

**The class token.** Since its refactoring of 2025 mtmd puts CLIP's class token behind the patches, while positions and
the choice of rows still take it for the first (ggml-org/llama.cpp, issue 25814). A file whose position embeddings are
rolled by one, with the class token's at the end, makes up for it: the features of all patches are right then, but the
first one's row is left out, and a row of the class token stands behind the last. Which layout a llama.cpp needs is
found by trying (``gm_mlx.llama.probe``), since the defect will be mended one day. Towers without a class token (SigLIP)
are exact in any case.

**Fewer image tokens.** mtmd's ``ldpv2`` is the two-layer MLP, 2 x 2 average pooling of a 24 x 24 grid, and a depthwise
convolution that is added to its input. With a convolution of zeros it is LLaVA's projector followed by pooling. Its
kernel is float16 in any file: llama.cpp's CPU backend stops the program at a float32 one.

mtmd has one GELU, of the tanh kind, where LLaVA's projector has the exact one: they differ by less than 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, changed, constant
from gm_mlx.convert.to_gguf.text import is_native
from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig
from gm_mlx.tensors import Tensor

PositionLayout = Literal["cls_first", "cls_last"]

TOWER = "vision_tower.vision_model"
POOLED_GRID = 24  # side of the grid that ldpv2 pools, and by how much: both are fixed in mtmd
POOLING = 2

# Tensors of a tower layer, ours and theirs; each has a weight and a bias.
LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# Keys that tell mtmd the activation of the tower. Its GELU is the tanh one, which stands for the exact one too.
ACTIVATION_KEYS: dict[str, dict[str, bool]] = {
    "quick_gelu": {},
    "gelu": {"clip.use_gelu": True},
    "gelu_pytorch_tanh": {"clip.use_gelu": True},
    "silu": {"clip.use_silu": True},
}


def check_vision(config: ModelConfig) -> None:
    """Refuse a tower or projector that mtmd does not compute; raises ``UserError`` with the key and the reason."""
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    grid, pooling = vision.grid, config.spatial_pool_stride
    needed = {
        "vision_feature_select_strategy": (
            strategy == ("default" if vision.is_clip else "full"),
            f"is {strategy!r}, and mtmd reads all patches and nothing else",
        ),
        "projector_hidden_act": (
            config.projector_hidden_act in ("gelu", "gelu_pytorch_tanh"),
            f"is {config.projector_hidden_act!r}, and mtmd's projector has a GELU",
        ),
        "vision_feature_layer": (config.num_vision_layers_used > 0, "reads the tower before its first layer"),
        "spatial_pool_stride": (
            pooling == 1 or (pooling, grid) == (POOLING, POOLED_GRID),
            f"is {pooling} for {grid} x {grid} patches, and mtmd pools {POOLED_GRID} x {POOLED_GRID} by {POOLING} only",
        ),
    }
    for key, (fits, why) in needed.items():
        if not fits:
            raise UserError(f"{key}: {why}; this model cannot be written as GGUF")


def vision_model(
    config: ModelConfig, tensors: Mapping[str, Tensor], image: ImageConfig, layout: PositionLayout
) -> GGUFModel:
    """Tower and projector as mtmd runs them.

    Args:
        config: the model's config.
        tensors: its tensors by gm-mlx's names, none of them quantized.
        image: how images are normalised.
        layout: where the class token's position embedding stands; of no effect without a class token.

    Raises:
        UserError: mtmd does not compute this tower or projector.
    """
    check_vision(config)
    vision, layers = config.vision_config, config.num_vision_layers_used
    rolled = vision.is_clip and layout == "cls_last"
    pieces = [
        Piece("v.patch_embd.weight", _channels_first(tensors[f"{TOWER}.embeddings.patch_embedding.weight"]), "F32"),
        Piece("v.position_embd.weight", _positions(tensors, rolled), "F32"),
    ]
    if vision.is_clip:
        pieces.append(Piece("v.class_embd", tensors[f"{TOWER}.embeddings.class_embedding"], "F32"))
        pieces += _pair("v.pre_ln", tensors, f"{TOWER}.pre_layrnorm", norm=True)
    else:
        pieces.append(Piece("v.patch_embd.bias", tensors[f"{TOWER}.embeddings.patch_embedding.bias"], "F32"))
    # A down projection with as many inputs as the stream has channels is to mtmd an up projection under an old name.
    swapped = vision.intermediate_size == vision.hidden_size
    names = LAYER | ({"mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"} if swapped else {})
    for i in range(layers):
        for old, new in names.items():
            pieces += _pair(f"v.blk.{i}.{new}", tensors, f"{TOWER}.encoder.layers.{i}.{old}", norm="norm" in old)
    projector, projector_pieces = _projector(config, tensors)
    metadata: dict[str, Any] = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": layers,
        "clip.vision.feature_layer": [layers],
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.image_mean": list(image.mean),
        "clip.vision.image_std": list(image.std),
        **ACTIVATION_KEYS[vision.hidden_act],
        "gm.position_layout": layout if vision.is_clip else "none",
        "gm.image_tokens": config.num_image_tokens,
    }
    return GGUFModel("clip", metadata, pieces + projector_pieces)


def _projector(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[str, list[Piece]]:
    """mtmd's name of the projector and its tensors."""
    pooled = config.spatial_pool_stride > 1
    names = ("mm.model.mlp.0", "mm.model.mlp.2") if pooled else ("mm.0", "mm.2")
    pieces = _pair(names[0], tensors, "multi_modal_projector.linear_1")
    factor = _feature_scale(config)
    for last in _pair(names[1], tensors, "multi_modal_projector.linear_2"):
        pieces.append(last if factor == 1 else replace(last, tensor=_times(last.tensor, factor)))
    if not pooled:
        return "mlp", pieces
    size = config.text_config.hidden_size
    kernel = Piece("mm.model.peg.0.weight", constant(0, size, 1, 3, 3), "F16")
    return "ldpv2", [*pieces, kernel, Piece("mm.model.peg.0.bias", constant(0, size), "F32")]


def _feature_scale(config: ModelConfig) -> float:
    """What image features are multiplied by, so that they enter the first layer as they do in the model.

    llama.cpp multiplies all that enters a ``gemma`` by sqrt(n_embd), and of what enters a ``gemma4`` only tokens.
    """
    wanted = math.sqrt(config.text_config.hidden_size) if config.scale_image_features else 1.0
    return wanted / (math.sqrt(config.text_config.hidden_size) if is_native(config.text_config) else 1.0)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return changed(tensor, lambda values: values * factor)


def _pair(new: str, tensors: Mapping[str, Tensor], old: str, norm: bool = False) -> list[Piece]:
    weight = Piece(f"{new}.weight", tensors[f"{old}.weight"], "F32" if norm else None)
    return [weight, Piece(f"{new}.bias", tensors[f"{old}.bias"], "F32")]


def _positions(tensors: Mapping[str, Tensor], rolled: bool) -> Tensor:
    """Position embeddings [1 + N, D], the class token's first, or last if ``rolled``; [N, D] without a class token."""
    positions = tensors[f"{TOWER}.embeddings.position_embedding.weight"]
    return replace(positions, read=lambda: mx.roll(positions.read(), -1, 0)) if rolled else positions


def _channels_first(kernel: Tensor) -> Tensor:
    """MLX's kernel [out, H, W, in] as [out, in, H, W]."""
    out, height, width, channels = kernel.shape
    return Tensor(kernel.dtype, (out, channels, height, width), lambda: kernel.read().transpose(0, 3, 1, 2))
