"""A model with random weights in the shape of a preset: to try formats, sizes and speeds before weights exist.

Values depend on the seed and on the tensor's name alone, and are made when a tensor is read, so a model of any size is
written like one from files. They are spread as in a new model, so that activations keep their size from layer to layer.
What such a model says is noise.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from functools import partial

import mlx.core as mx

from gm_mlx.config import ModelConfig
from gm_mlx.convert.translate import Translation
from gm_mlx.errors import UserError
from gm_mlx.hub import find_model
from gm_mlx.images import CLIP_MEAN, CLIP_STD, HALF, ImageConfig
from gm_mlx.model import Model
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.safetensors_writer import DTYPE_NAMES
from gm_mlx.tensors import Tensor
from gm_mlx.weights import DTYPES, named_arrays

DTYPE = "bfloat16"
CHUNK = 1 << 22  # values made at a time: on the way they take several times the memory


def random_model(preset: str, seed: int = 0, dtype: str | None = None) -> Translation:
    """A preset with random weights and gm-tiny's tokenizer.

    Args:
        preset: a key of ``PRESETS``.
        seed: another seed gives other weights.
        dtype: "float32", "float16" or "bfloat16" (the default).

    Raises:
        UserError: there is no such preset, or this installation lacks gm-tiny.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; choose one of {', '.join(PRESETS)}")
    config = PRESETS[preset]
    processor = _processor(config)
    provenance = {
        "layout": "random weights",
        "preset": preset,
        "seed": seed,
        "template": processor.template.name,
        "vocab_cut": processor.tokenizer.vocab_size,
    }
    tensors = random_tensors(config, seed, dtype or DTYPE)
    return Translation(config, tensors, processor, provenance, [], ["the weights are random: it will talk nonsense"])


def random_tensors(config: ModelConfig, seed: int = 0, dtype: str = DTYPE) -> dict[str, Tensor]:
    """All tensors of a model, not made yet.

    Args:
        config: the model.
        seed: another seed gives other weights.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        By name: norms as in a new model, biases zero, and matrices uniform with a variance of one over the number of
        inputs.
    """
    kind = DTYPES[dtype]
    tensors = {}
    for name, array in named_arrays(Model(config)).items():  # of a new model, where nothing is computed but norms
        shape = array.shape
        if array.ndim == 1:
            value = float(array[0]) if name.endswith(".weight") else 0.0
            read = partial(mx.full, shape, value, kind)
        else:
            read = partial(_uniform, shape, zlib.crc32(f"{seed} {name}".encode()), _bound(name, shape), kind)
        tensors[name] = Tensor(DTYPE_NAMES[kind], shape, read)
    return tensors


def _bound(name: str, shape: tuple[int, ...]) -> float:
    """The bound of a uniform distribution with variance 1 / inputs."""
    inputs = shape[-1]
    if name.endswith((".u", ".v")):  # a low-rank router multiplies from the other side
        inputs = shape[0]
    elif len(shape) == 4:  # the patch embedding, [D, P, P, 3]
        inputs = math.prod(shape[1:])
    return math.sqrt(3 / inputs)


def _uniform(shape: tuple[int, ...], seed: int, bound: float, dtype: mx.Dtype) -> mx.array:
    size = math.prod(shape)
    keys = mx.random.split(mx.random.key(seed), -(-size // CHUNK))
    chunks = []
    for number, key in enumerate(keys):  # type: ignore[arg-type,var-annotated]
        count = min(CHUNK, size - number * CHUNK)
        chunks.append(mx.random.uniform(-bound, bound, (count,), key=key).astype(dtype))
        mx.eval(chunks[-1])
    return mx.concatenate(chunks).reshape(shape)


def _processor(config: ModelConfig) -> Processor:
    """gm-tiny's tokenizer and template, with images as the preset's tower reads them."""
    vision = config.vision_config
    if vision.is_clip:
        image = ImageConfig(vision.image_size, "pad", CLIP_MEAN, CLIP_STD)
    else:
        image = ImageConfig(vision.image_size, "resize", HALF, HALF)
    return dataclasses.replace(
        Processor.from_folder(find_model()),
        image=image,
        image_token_id=config.image_token_index,
        tokens_per_image=config.num_image_tokens,
    )
