"""Tower and projector for llama.cpp's vision library (mtmd): architecture ``clip``, projectors in ``projectors``.

**How many layers run.** mtmd runs a LLaVA tower to its last layer but one, and PyTorch's folders hold all layers for
it. Here the layers behind the one that is read do not exist, so the file says which hidden state is meant
(``feature_layer``), and mtmd runs to it.

**The class token.** Since its refactoring of 2025 mtmd puts CLIP's class token behind the patches, while positions and
the choice of rows still take it for the first (ggml-org/llama.cpp, issue 25814). A file whose position embeddings are
rolled by one, with the class token's at the end, makes up for it: the features of all patches are right then, but the
first one's row is left out, and a row of the class token stands behind the last. Which layout a llama.cpp needs is
found by trying (``gm_mlx.llama.probe``), since the defect will be mended one day. Towers without a class token (SigLIP)
are exact in any case.

**The last norm.** A tower that has one (``post_norm``) has it in the file, and mtmd applies it to what it has computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.pieces import GGUFModel, Piece, channels_first, pair
from gm_mlx.convert.to_gguf.projectors import GRID, POOLING, projector_pieces
from gm_mlx.convert.to_gguf.text import find_architecture
from gm_mlx.errors import UserError
from gm_mlx.images import ImageConfig
from gm_mlx.tensors import Tensor

PositionLayout = Literal["cls_first", "cls_last"]

TOWER = "vision_tower.vision_model"

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
    grid, pooling, kind = vision.grid, config.spatial_pool_stride, config.projector_type
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
            pooling == 1 or (pooling, grid) == (POOLING, GRID),
            f"is {pooling} for {grid} x {grid} patches, and mtmd pools {GRID} x {GRID} by {POOLING} only",
        ),
        "projector_type": (
            kind == "mlp2x_gelu" or grid == GRID,
            f"is {kind!r} for {grid} x {grid} patches, and mtmd's reads {GRID} x {GRID} only",
        ),
        "text_config.norm": (
            kind == "mlp2x_gelu" or not find_architecture(config.text_config).centred,
            f"is 'layer', before which image features must have a mean of zero, and {kind!r} does not give that",
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
        Piece("v.patch_embd.weight", channels_first(tensors[f"{TOWER}.embeddings.patch_embedding.weight"]), "F32"),
        Piece("v.position_embd.weight", _positions(tensors, rolled), "F32"),
    ]
    if vision.is_clip:
        pieces.append(Piece("v.class_embd", tensors[f"{TOWER}.embeddings.class_embedding"], "F32"))
        pieces += pair("v.pre_ln", tensors, f"{TOWER}.pre_layrnorm", norm=True)
    else:
        pieces.append(Piece("v.patch_embd.bias", tensors[f"{TOWER}.embeddings.patch_embedding.bias"], "F32"))
    # A down projection with as many inputs as the stream has channels is to mtmd an up projection under an old name.
    swapped = vision.intermediate_size == vision.hidden_size
    names = LAYER | ({"mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"} if swapped else {})
    for i in range(layers):
        for old, new in names.items():
            pieces += pair(f"v.blk.{i}.{new}", tensors, f"{TOWER}.encoder.layers.{i}.{old}", norm="norm" in old)
    if vision.post_norm:
        pieces += pair("v.post_ln", tensors, f"{TOWER}.post_layernorm", norm=True)
    projector, more = projector_pieces(config, tensors)
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
    return GGUFModel("clip", metadata, pieces + more)


def _positions(tensors: Mapping[str, Tensor], rolled: bool) -> Tensor:
    """Position embeddings [1 + N, D], the class token's first, or last if ``rolled``; [N, D] without a class token."""
    positions = tensors[f"{TOWER}.embeddings.position_embedding.weight"]
    return replace(positions, read=lambda: mx.roll(positions.read(), -1, 0)) if rolled else positions
