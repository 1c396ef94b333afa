"""The papers' three stages of MoE-tuning, as the parts of the model that learn in each.

1. The projector alone, on captions: the tower's features learn the decoder's language.
2. Projector and decoder, on instructions. The decoder is still dense.
3. Every other feed-forward network becomes a mixture of experts that start as its copies, and only these and their
   routers learn (MoE-LLaVA, section 3.3; LLaVA-GM, stage 3). MoE-LLaVA finds that experts trained from the start do
   worse than experts that start from a good dense model.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from gm_mlx.config import MoEConfig
from gm_mlx.model import Model
from gm_mlx.moe import SparseMLP


def select_stage(model: Model, stage: int) -> None:
    """Freeze everything but what learns in stage 1, 2 or 3."""
    model.freeze()
    learns: dict[int, list[nn.Module]] = {
        1: [model.multi_modal_projector],
        2: [model.multi_modal_projector, model.language_model],
        3: [block.mlp for block in model.layers if isinstance(block.mlp, SparseMLP)],
    }
    for module in learns[stage]:
        module.unfreeze()


def upcycle(model: Model, moe: MoEConfig) -> Model:
    """A sparse model whose experts are copies of a dense model's feed-forward networks.

    The weights of the chosen experts sum to one (``norm_topk_prob``), so before any training the sparse model's output
    is the dense one's, whatever the fresh routers say.

    Args:
        model: a dense model, not quantized.
        moe: the experts to make.

    Returns:
        A new model that shares every other array with the old one.
    """
    text = dataclasses.replace(model.config.text_config, moe=moe)
    sparse = Model(dataclasses.replace(model.config, text_config=text))
    weights = dict(tree_flatten(model.parameters()))
    for index in text.sparse_layers:
        prefix = f"language_model.model.layers.{index}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = weights.pop(f"{prefix}.{name}.weight")
            weights[f"{prefix}.switch_mlp.{name}.weight"] = mx.repeat(dense[None], moe.num_experts, axis=0)
            if moe.use_residual:
                weights[f"{prefix}.mlp.{name}.weight"] = dense
    sparse.update(tree_unflatten(list(weights.items())))
    return sparse
