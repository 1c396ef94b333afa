"""GGUF folders of tiny models, for tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from fixtures import tiny_model
from tiny_tokenizer import write_sentencepiece

from gm_mlx.chat_template import GEMMA
from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf.folder import gguf_pair, write_gguf_folder
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.vision import PositionLayout
from gm_mlx.images import HALF, ImageConfig
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.safetensors_writer import DTYPE_NAMES
from gm_mlx.tensors import Tensor
from gm_mlx.tokenizer import load_tokenizer
from gm_mlx.vision import VisionTower
from gm_mlx.weights import named_arrays

# Where random models have their experts. Every mode stands in at least one of a test's models.
MODES: list[dict[str, Any]] = [
    {"mode": "sparse"},
    {"mode": "dense"},
    {"mode": "first_half"},
    {"mode": "second_half"},
    {"mode": "custom", "layers_idx": (1,)},
]


def as_tensors(weights: dict[str, np.ndarray] | dict[str, mx.array]) -> dict[str, Tensor]:
    """Arrays as tensors of a file."""
    arrays = {name: mx.array(array) for name, array in weights.items()}
    return {name: Tensor(DTYPE_NAMES[a.dtype], a.shape, lambda a=a: a) for name, a in arrays.items()}  # type: ignore[misc]


def tiny_processor(config: ModelConfig, folder: Path) -> Processor:
    """A processor with the tiny tokenizer, which is written into the folder."""
    tokenizer = load_tokenizer(write_sentencepiece(folder), GEMMA.controls)
    image = ImageConfig(config.vision_config.image_size, "resize", HALF, HALF)
    return Processor(tokenizer, GEMMA, image, config.image_token_index, config.num_image_tokens)


def gguf_folder(
    out: Path, model: Model | None = None, file_type: str = "F32", layout: PositionLayout = "cls_first"
) -> Path:
    """Write a folder with both files of a model and return it; the model's own folder is beside it."""
    model = model or tiny_model()
    processor = tiny_processor(model.config, out.with_name(f"{out.name}-tokenizer"))
    tensors = as_tensors(named_arrays(model))
    pair = gguf_pair(model.config, tensors, processor, name="tiny", layout=layout)
    write_gguf_folder(out, pair, gm={"name": "tiny"}, card="", target=find_target(file_type, {}))
    return out


def image_features(model: Model, pixels: mx.array, rolled: bool) -> mx.array:
    """Features [N, T, D] of images; ``rolled``: what a llama.cpp with CLIP's defect can give at best.

    It leaves the first patch out, and has the class token behind the last one; see ``gm_mlx.convert.to_gguf.vision``.
    """
    if not rolled:
        return model.encode_images(pixels)
    tower = VisionTower(model.config.vision_config, model.config.num_vision_layers_used, keep_first=True)
    tower.load_weights([(n.removeprefix("vision_tower."), a) for n, a in named_arrays(model).items() if "tower" in n])
    everything = tower(pixels)  # [N, 1 + T, D], the class token first
    return model.project(mx.concatenate([everything[:, 2:], everything[:, :1]], axis=1))
