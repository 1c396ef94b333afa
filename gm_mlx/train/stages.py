"""The papers' three stages of MoE-tuning: which parts of the model learn in each, and experts made of a dense model.

1. The projector alone, on captions: the tower's features learn the decoder's language.
2. Projector and decoder, on instructions. The decoder is still dense.
3. Every other feed-forward network becomes a mixture of experts that start as its copies, and only these and their
   routers learn (MoE-LLaVA, section 3.3; LLaVA-GM, stage 3). MoE-LLaVA finds that experts trained from the start do
   worse than experts that start from a good dense model.

Parts have the names of ``gm_mlx.inventory``'s components. A component is all of a part or none of it, so what learns
is a list of words and not of patterns that may match more than was meant: MoE-LLaVA's own patterns for stage 3 match
the dense layers' feed-forward networks too, and its projector is left learning.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import mlx.core as mx

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.inventory import COMPONENTS, model_layers
from gm_mlx.model import Model
from gm_mlx.safetensors_writer import DTYPE_NAMES
from gm_mlx.tensors import Tensor
from gm_mlx.upcycle import upcycle as upcycle_tensors
from gm_mlx.weights import named_arrays, quantized_layers

# Words for several components; of these, a model need not have all.
WORDS = {
    "decoder": ("embeddings", "attention", "dense_ffn", "experts", "routers", "norms"),
    "moe": ("experts", "routers"),  # the routers' component has the coefficient of residual experts too
    "all_ffn": ("projector", "dense_ffn", "experts", "routers"),  # what MoE-LLaVA's code trains in stage 3
}

# What learns in each stage by the papers.
STAGES = {1: ("projector",), 2: ("projector", "decoder"), 3: ("moe",)}


def chosen_components(config: ModelConfig, trains: Iterable[str]) -> tuple[str, ...]:
    """The components that some words mean, in the order of ``COMPONENTS``.

    Args:
        config: the model.
        trains: components, or keys of ``WORDS``.

    Raises:
        UserError: a word is neither, or the model has nothing of it.
    """
    there = {layer.component for layer in model_layers(config)}
    chosen: set[str] = set()
    for word in trains:
        if word not in COMPONENTS and word not in WORDS:
            raise UserError(f"trains: {word!r} is none of {', '.join((*COMPONENTS, *WORDS))}")
        found = there.intersection(WORDS.get(word, (word,)))
        if not found:
            remedy = "make experts with --upcycle, such as 4x2" if "experts" in WORDS.get(word, (word,)) else ""
            raise UserError(f"trains: the model has no {word}; {remedy or 'leave it out'}")
        chosen |= found
    return tuple(component for component in COMPONENTS if component in chosen)


def select(model: Model, trains: Iterable[str]) -> dict[str, int]:
    """Let some components learn, whole, and freeze all others.

    Args:
        model: a model.
        trains: components, or keys of ``WORDS``.

    Returns:
        The components that learn, with the number of their parameters.

    Raises:
        UserError: a word means nothing here, or a layer that is to learn is quantized.
    """
    counts = dict.fromkeys(chosen_components(model.config, trains), 0)
    packed = quantized_layers(model)
    modules = dict(model.named_modules())
    layers = [layer for layer in model_layers(model.config) if layer.component in counts]
    for layer in layers:
        if layer.path in packed:
            raise UserError(
                f"trains: {layer.component} cannot learn as a whole, since {layer.path} is quantized; train LoRA on it "
                "(gm-mlx lora), or start from the model that is not quantized"
            )
    model.freeze()
    for layer in layers:
        modules[layer.path].unfreeze(keys=list(layer.arrays), recurse=False, strict=True)
        counts[layer.component] += layer.total
    return counts


def select_stage(model: Model, stage: int) -> dict[str, int]:
    """Let learn what learns in stage 1, 2 or 3 by the papers; see ``select``."""
    return select(model, STAGES[stage])


def upcycle(model: Model, moe: MoEConfig, *, seed: int = 0) -> Model:
    """A sparse model whose experts are copies of a dense model's feed-forward networks; see ``gm_mlx.upcycle``.

    It says what the dense model says, whatever the fresh routers want, since weights of chosen experts sum to one.

    Args:
        model: a dense model, not quantized.
        moe: the experts to make.
        seed: of the routers.

    Returns:
        A new model that shares every other array with the old one.

    Raises:
        UserError: the model cannot be upcycled.
    """
    config, tensors = upcycle_tensors(model.config, _in_memory(model), moe, seed=seed)
    sparse = Model(config)
    sparse.load_weights([(name, tensor.read()) for name, tensor in tensors.items()])
    sparse.train(model.training)
    return sparse


def _in_memory(model: Model) -> dict[str, Tensor]:
    return {
        name: Tensor(DTYPE_NAMES[array.dtype], array.shape, partial(_itself, array))
        for name, array in named_arrays(model).items()
    }


def _itself(array: mx.array) -> mx.array:
    return array
