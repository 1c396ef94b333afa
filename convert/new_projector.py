"""A projector with random weights between a language model and a vision tower: what stage 1 of training starts from.

The result is a checkpoint in LLaVA's own layout, and translated like any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from gm_mlx.convert.checkpoint import Checkpoint
from gm_mlx.convert.layouts import LAYOUTS
from gm_mlx.convert.layouts.llava import LLAVA
from gm_mlx.convert.layouts.towers import CLIP
from gm_mlx.convert.towers import find_tower
from gm_mlx.convert.values import Values
from gm_mlx.errors import UserError
from gm_mlx.safetensors_writer import MLX_DTYPES
from gm_mlx.tensors import Tensor

EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")  # the second is Qwen's


def with_new_projector(checkpoint: Checkpoint, vision: Path, seed: int = 0) -> Checkpoint:
    """Put a fresh projector on a language model.

    It is LLaVA's of two layers, drawn as torch draws linears: uniformly within 1 / sqrt(inputs).

    Args:
        checkpoint: a language model.
        vision: a folder with a CLIP or SigLIP model.
        seed: another seed gives other weights.

    Raises:
        UserError: the checkpoint has a projector already, or is no language model by Llama's names.
    """
    if any(layout.matches(checkpoint.tensors) for layout in LAYOUTS) or checkpoint.projector:
        raise UserError(f"{checkpoint.folder}: has a projector already; leave out --new-projector")
    embedding = next((checkpoint.tensors[name] for name in EMBEDDINGS if name in checkpoint.tensors), None)
    if embedding is None:
        raise UserError(f"{checkpoint.folder}: has no {EMBEDDINGS[0]}; --new-projector takes a language model")
    config = Values(checkpoint.folder / "config.json", checkpoint.config)
    tower = find_tower(LLAVA, config, {}, vision).config
    size = embedding.shape[1]
    widths = {"0": tower["hidden_size"], "2": size}  # of the inputs
    random = np.random.default_rng(seed)
    tensors = {
        f"model.mm_projector.{layer}.{name}": _drawn(int(random.integers(2**32)), shape, width**-0.5, embedding.dtype)
        for layer, width in widths.items()
        for name, shape in (("weight", (size, width)), ("bias", (size,)))
    }
    # CLIP's first position is its class token and left out, as in LLaVA; SigLIP's is a patch.
    feature = "patch" if tower["model_type"] == CLIP.model_type else "cls_patch"
    said = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": feature, "image_aspect_ratio": "pad"}
    return replace(checkpoint, tensors=checkpoint.tensors | tensors, config={**checkpoint.config, **said})


def _drawn(seed: int, shape: tuple[int, ...], bound: float, dtype: str) -> Tensor:
    def read() -> mx.array:
        values = np.random.default_rng(seed).uniform(-bound, bound, shape)
        return mx.array(values.astype(np.float32)).astype(MLX_DTYPES[dtype])

    return Tensor(dtype, shape, read)
