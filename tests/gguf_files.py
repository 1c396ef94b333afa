"""GGUF folders of tiny models, for tests that need one."""

from __future__ import annotations

from pathlib import Path

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
from gm_mlx.weights import named_arrays


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
