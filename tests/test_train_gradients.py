"""Gradients of training against PyTorch's autograd on the tiny reference model, for each group that can learn.

PyTorch runs Hugging Face's LLaVA with a loop over tokens for experts, and the loss as its formulas are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lora_models
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from lora_models import everything, model_of, trained
from mlx.utils import tree_flatten
from torch_reference import (
    CLIP,
    IMAGE_TOKEN,
    SIGLIP,
    TEXT,
    NaiveMoE,
    llava,
    model_pair,
    our_name,
    relative_error,
)
from torch_reference import weights as renamed_weights

from gm_mlx.capacity import Capacity, set_capacity
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.inventory import COMPONENTS, model_layers
from gm_mlx.lora.attach import wrappers
from gm_mlx.lora.layers import LowRank, float_weight
from gm_mlx.model import Model
from gm_mlx.moe import set_gumbel
from gm_mlx.train import cross_entropy
from gm_mlx.train.checkpointing import checkpointed_blocks
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.stages import select_stage

TOLERANCE = 1e-4
LOSS = AnswerLoss(aux_loss_coef=0.5, z_loss_coef=0.2)  # so large that no gradient is that of the answers alone
DENSE = ModelConfig(text_config=TEXT, vision_config=CLIP, image_token_index=IMAGE_TOKEN)

MODELS: dict[str, ModelConfig] = {
    "dense": DENSE,
    **{
        name: replace(DENSE, text_config=replace(TEXT, moe=moe))
        for name, moe in {
            "top-2": MoEConfig(),
            "top-2 of raw probabilities": MoEConfig(norm_topk_prob=False),
            "top-1 of raw probabilities": MoEConfig(num_experts=2, top_k=1, norm_topk_prob=False),
            "top-3 everywhere": MoEConfig(num_experts=5, top_k=3, mode="dense"),
            "router of a low rank": MoEConfig(router_rank=2),
            "residual": MoEConfig(use_residual=True),
            "residual, top-1": MoEConfig(top_k=1, norm_topk_prob=False, use_residual=True),
        }.items()
    },
    "SigLIP": replace(
        DENSE,
        text_config=replace(TEXT, moe=MoEConfig()),
        vision_config=SIGLIP,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
}


def batch_of(config: ModelConfig) -> Batch:
    """Rows of different lengths: one and two images, an answer at the end, one in the middle, and no image."""
    random = np.random.default_rng(7)
    slots = [config.image_token_index] * config.num_image_tokens
    size = config.vision_config.image_size
    examples = []
    for images, answers in ((1, [(3, 7)]), (2, [(2, 4), (9, 12)]), (0, [(5, 6)])):
        ids = [*slots * images, *random.integers(3, 60, 12)]
        learnt = np.zeros(len(ids), dtype=bool)
        for start, stop in answers:
            learnt[len(slots) * images + start : len(slots) * images + stop] = True
        pixels = random.normal(size=(images, size, size, 3)).astype(np.float32) if images else None
        examples.append(Example(ids, learnt, pixels))
    return collate(examples, pad_id=0)


def our_gradients(model: Model, batch: Batch, loss: AnswerLoss = LOSS) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradients per learnt token, as the training loop has them."""
    model.train()
    (total, count, _), gradients = nn.value_and_grad(model, loss)(model, batch)
    return (total / count).item(), {name: value / count for name, value in tree_flatten(gradients)}


def their_loss(reference: Any, batch: Batch, call: Callable[..., Any] | None = None) -> torch.Tensor:
    """Cross-entropy per learnt token, balance and router z-loss, of real positions."""
    pixels = torch.from_numpy(np.array(batch.pixels).transpose(0, 3, 1, 2).copy())
    ids = torch.from_numpy(batch.ids).long()
    logits = (call or reference)(input_ids=ids, pixel_values=pixels).logits
    learnt = torch.from_numpy(batch.learnt)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][learnt], ids[:, 1:][learnt])
    real = torch.from_numpy(batch.real).reshape(-1)
    for layer in reference.modules():
        if isinstance(layer, NaiveMoE):
            loss = loss + LOSS.aux_loss_coef * layer.load_balancing_loss(real)
            loss = loss + LOSS.z_loss_coef * layer.logits[real].logsumexp(dim=-1).square().mean()
    return loss


def their_gradients(reference: Any, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients under our names; nothing of what is frozen."""
    loss = their_loss(reference, batch)
    loss.backward()
    learning = set()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.grad is not None:
                learning.add(re.sub(r"experts\.\d+", "switch_mlp", our_name(name) or ""))
            # An expert that no token chose has none in PyTorch.
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss.item(), {name: value for name, value in renamed_weights(reference).items() if name in learning}


def component_of(config: ModelConfig) -> dict[str, str]:
    """The component of each of a model's parameters."""
    layers = model_layers(config)
    return {f"{layer.path}.{array}": layer.component for layer in layers for array in layer.arrays}


def assert_equal(ours: tuple[float, dict[str, mx.array]], theirs: tuple[float, dict[str, np.ndarray]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        if name.startswith("vision_tower") and name.endswith("k_proj.bias"):
            # Without rotary positions it adds the same to all scores of a query, which softmax does not see.
            assert max(np.abs(gradient).max(), np.abs(theirs[1][name]).max()) < 1e-7, name
            continue
        assert np.abs(theirs[1][name]).max() > 1e-6, name
        assert relative_error(gradient, theirs[1][name]) <= TOLERANCE, name


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter(name: str) -> None:
    config = MODELS[name]
    model, reference = model_pair(config)
    batch = batch_of(config)
    ours = our_gradients(model, batch)
    assert_equal(ours, their_gradients(reference, batch))
    absent = {"experts", "routers"} if name == "dense" else {"dense_ffn"} if "everywhere" in name else set()
    assert {component_of(config)[name] for name in ours[1]} == set(COMPONENTS) - absent


@pytest.fixture(params=["at once", "in pieces"])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the learnt tokens, of which there are ten, computed in one piece or four rows at a time."""
    if request.param == "in pieces":
        monkeypatch.setattr(cross_entropy, "rows_at_a_time", lambda *_: 4)


@pytest.mark.usefixtures("logits")
@pytest.mark.parametrize(
    ("name", "stage", "learns"),
    [
        ("dense", 1, {"projector"}),
        ("dense", 2, {"projector", "embeddings", "attention", "dense_ffn", "norms"}),
        ("top-2", 3, {"experts", "routers"}),
        ("residual", 3, {"experts", "routers"}),
    ],
)
def test_stages_have_gradients_of_what_learns_and_of_nothing_else(name: str, stage: int, learns: set[str]) -> None:
    config = MODELS[name]
    model, reference = model_pair(config)
    components, batch = component_of(config), batch_of(config)
    select_stage(model, stage)
    for at, parameter in reference.named_parameters():
        ours = re.sub(r"experts\.\d+", "switch_mlp", our_name(at) or "")
        parameter.requires_grad_(components.get(ours) in learns)
    found = our_gradients(model, batch)
    assert_equal(found, their_gradients(reference, batch))
    assert {components[name] for name in found[1]} == learns


@pytest.mark.parametrize("component", COMPONENTS)
def test_any_component_can_be_frozen(component: str) -> None:
    """What is frozen has no gradient, and the others have the gradients that they have without it."""
    config = MODELS["top-2"]
    model, _ = model_pair(config)
    components, batch = component_of(config), batch_of(config)
    _, everything_learns = our_gradients(model, batch)
    for layer in model_layers(config):
        if layer.component == component:
            dict(model.named_modules())[layer.path].freeze(keys=list(layer.arrays), recurse=False)
    _, rest = our_gradients(model, batch)
    assert rest.keys() == {name for name in everything_learns if components[name] != component}
    for name, gradient in rest.items():
        assert relative_error(gradient, np.array(everything_learns[name])) < 1e-5, name


def test_blocks_that_are_computed_again_draw_the_same() -> None:
    """Gradient checkpointing with Gumbel draws of second experts, and a lottery for the room at experts."""
    model, _ = model_pair(MODELS["top-3 everywhere"])
    batch, found = batch_of(MODELS["top-3 everywhere"]), []
    for drawn in (False, True):
        set_gumbel(model, drawn)
        set_capacity(model, Capacity(0.7, by="random") if drawn else None)
        for again in (False, True):
            mx.random.seed(3)
            with checkpointed_blocks(model, again):
                found.append(our_gradients(model, batch))
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    for plain, again in (found[:2], found[2:]):
        for name, gradient in plain[1].items():
            if np.abs(gradient).max() > 1e-6:  # of a tower's key biases it is rounding
                assert relative_error(again[1][name], np.array(gradient)) < 1e-5, name


def float_arrays(model: Model) -> dict[str, np.ndarray]:
    """A model's weights under its own names, quantized ones unpacked."""
    arrays = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    for path, module in model.named_modules():
        if "scales" in module:
            experts = range(len(module.weight)) if module.weight.ndim == 3 else None
            unpacked = float_weight(module) if experts is None else mx.stack([float_weight(module, e) for e in experts])
            arrays[f"{path}.weight"] = np.array(unpacked)
    return arrays


def reference_of(model: Model) -> Any:
    """PyTorch's model with the weights of a model that has no LoRA yet."""
    reference, arrays = llava(model.config), float_arrays(model)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            ours = our_name(name)
            if ours is None or ".post_layernorm" in ours:
                continue
            if expert := re.search(r"experts\.(\d+)", ours):
                value = arrays[ours.replace(expert[0], "switch_mlp")][int(expert[1])]
            else:
                value = arrays[ours]
            value = value.transpose(0, 3, 1, 2) if "patch_embedding.weight" in ours else value
            parameter.copy_(torch.from_numpy(value.copy()))
    return reference.requires_grad_(False)


class Leaves(dict[str, torch.Tensor]):
    """PyTorch's copies of an adapter's arrays, by our names, from which it makes weights."""

    def __init__(self, adapters: dict[str, LowRank]) -> None:
        super().__init__()
        self.adapters = adapters
        for path, low in adapters.items():
            for part in ("lora_a", "lora_b", "magnitude"):
                if part in low:
                    self[f"{path}.{part}"] = torch.from_numpy(np.array(low[part])).requires_grad_()

    def weight(self, path: str, expert: int | None, base: torch.Tensor) -> torch.Tensor:
        """W + scale * B A, or DoRA's m * (W + scale * B A) / |W + scale * B A| with the length taken as a constant."""
        low = self.adapters[path]
        a, b = (self[f"{path}.{part}"] if expert is None else self[f"{path}.{part}"][expert] for part in PARTS)
        change = low.alpha / (math.sqrt(low.rank) if low.rslora else low.rank) * (b @ a)
        moved = base + (change.T if "embed_tokens" in path else change)
        if "magnitude" not in low:
            return moved
        magnitude = self[f"{path}.magnitude"]
        magnitude = magnitude if expert is None else magnitude[expert]
        return magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True).detach()


PARTS = ("lora_a", "lora_b")


@pytest.mark.usefixtures("logits")
@pytest.mark.parametrize("table", [None, "q4", "mixed"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters(kind: str, table: str | None) -> None:
    """Of every part, on a base that is quantized or not: A, B and DoRA's lengths."""
    model = model_of("gemma", table)
    reference = reference_of(model)
    trained(model, replace(everything("gemma", dora=kind == "dora"), rslora=kind == "rslora"))
    leaves = Leaves({path: wrapper.adapters[0] for path, wrapper in wrappers(model).items()})
    batch = batch_of(model.config)

    replaced = {}
    for name, parameter in reference.named_parameters():
        ours = our_name(name) or ""
        expert = re.search(r"experts\.(\d+)", ours)
        path = (ours.replace(expert[0], "switch_mlp") if expert else ours).removesuffix(".weight")
        if path in leaves.adapters:
            replaced[name] = leaves.weight(path, int(expert[1]) if expert else None, parameter)
    loss = their_loss(reference, batch, lambda **x: torch.func.functional_call(reference, replaced, kwargs=x))
    loss.backward()

    ours = our_gradients(model, batch)
    theirs = {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}
    assert_equal(
        (ours[0], {name.replace(".adapters.0", ""): value for name, value in ours[1].items()}), (loss.item(), theirs)
    )
    layers = {layer.path: layer.component for layer in model_layers(model.config)}
    without = {"norms", "embeddings"} if kind == "dora" else {"norms"}
    assert {layers[path] for path in leaves.adapters} == set(COMPONENTS) - without
    assert lora_models.error(lora_models.logits(model), lora_models.logits(model_of("gemma", table))) > 0.05
