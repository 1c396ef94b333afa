"""Eve's stage 3: what learns, gradients against PyTorch, and a batch in which only some rows have pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
import torch
from checkpoints import convert, loaded
from eve_models import CONFIG, write_eve
from eve_reference import Elastic, eve
from fixtures import tiny_model
from mlx.utils import tree_flatten, tree_unflatten
from torch_reference import relative_error

from gm_mlx.evf import ImgGBPR, set_allocation
from gm_mlx.model import Model
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.losses import AnswerLoss
from gm_mlx.train.stages import select

IMAGE, TOKENS = CONFIG.image_token_index, CONFIG.num_image_tokens


def example(seed: int, images: int = 1, words: int = 9) -> Example:
    """A row whose last four tokens are learnt."""
    random = np.random.default_rng(seed)
    ids = [1, *[IMAGE] * (images * TOKENS), *random.integers(3, 300, words).tolist()]
    learnt = np.arange(len(ids)) >= len(ids) - 4
    pixels = random.normal(size=(images, 32, 32, 3)).astype(np.float32) if images else None
    return Example(ids, learnt, pixels)


def gradients(
    model: Model, batch: Batch, loss: AnswerLoss
) -> tuple[mx.array, dict[str, mx.array], dict[str, mx.array]]:
    def total(batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        value, _, figures = loss(model, batch)
        return value, figures

    (value, figures), found = nn.value_and_grad(model, total)(batch)
    return value, figures, dict(tree_flatten(found))


def test_gradients_and_losses_equal_pytorch(tmp_path: Path) -> None:
    reference = eve(CONFIG)
    model = loaded(convert(write_eve(tmp_path, reference)))
    model.train()
    assert select(model, ["moe"]).keys() == {"experts", "routers"}
    batch = collate([example(0), example(1)], pad_id=0, multiple=1)
    value, figures, found = gradients(model, batch, AnswerLoss())

    logits = reference(np.asarray(batch.ids, np.int64), np.array(batch.pixels))
    rows, columns = np.nonzero(batch.learnt)
    targets = torch.from_numpy(batch.ids[rows, columns].astype(np.int64))
    answers = torch.nn.functional.cross_entropy(logits[rows, columns - 1], targets, reduction="sum")
    balance = torch.zeros(())
    layers = [layer.mlp for layer in reference.model.layers if isinstance(layer.mlp, Elastic)]
    for layer in layers:
        p = torch.stack([p for p, _ in layer.seen])
        shares = torch.tensor([sum(chosen == ffn for _, chosen in layer.seen) / len(layer.seen) for ffn in (0, 1)])
        balance = balance + (shares * p.mean(dim=0)).sum()
    assert figures["answers"].item() == pytest.approx(answers.item(), rel=1e-4)
    assert figures["balance"].item() == pytest.approx(8 * balance.item(), rel=1e-5)
    total = answers + 0.001 * 8 * balance
    assert value.item() == pytest.approx(total.item(), rel=1e-4)

    total.backward()
    wanted = {}
    for index, layer in zip((0, 2), layers, strict=True):
        prefix = f"language_model.model.layers.{index}.mlp"
        wanted[f"{prefix}.gate.weight"] = layer.deepspeed_moe.gate.wg.weight.grad
        for name, parameter in layer.deepspeed_moe.experts.deepspeed_experts[1].named_parameters():
            wanted[f"{prefix}.vision_ffn.{name}"] = parameter.grad
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient.numpy()) <= 1e-3, name


@pytest.mark.parametrize("allocation", [None, ImgGBPR(1.5, 0.5)])
def test_rows_without_pictures_teach_nothing_to_vision_ffns(allocation: ImgGBPR | None) -> None:
    """Beside rows with pictures as well as by themselves; their own loss is that of the language model."""
    model = tiny_model(config=CONFIG)
    model.train()
    set_allocation(model, allocation)
    select(model, ["moe"])
    loss = AnswerLoss()
    pictures, words = [example(0), example(1)], [example(2, images=0), example(3, images=0)]
    alone, alone_figures, taught = gradients(model, collate(words, pad_id=0), loss)
    assert all(mx.abs(gradient).max().item() == 0 for gradient in taught.values())
    assert alone_figures["balance"].item() == 0
    first, first_figures, wanted = gradients(model, collate(pictures, pad_id=0), replace(loss, aux_loss_coef=0.0))
    both, figures, found = gradients(model, collate(pictures + words, pad_id=0), replace(loss, aux_loss_coef=0.0))
    assert figures.keys() == alone_figures.keys() == first_figures.keys()
    assert both.item() == pytest.approx((first + alone).item(), rel=1e-5)
    for name, gradient in wanted.items():
        assert relative_error(found[name], np.array(gradient)) <= 1e-4, name
    loads = np.array(figures["load.0"])
    assert loads.sum() == figures["positions"].item()


def test_what_finds_no_room_is_told() -> None:
    """Of 17 positions 4 are an image's; each FFN takes 9, so 4 of the 13 of text are over."""
    model = tiny_model(config=CONFIG)
    model.train()
    set_allocation(model, ImgGBPR(1.0, 0.0))
    loss = AnswerLoss()
    _, count, figures = loss(model, collate([example(0, words=12)], pad_id=0))
    described = loss.describe({name: np.array(figure) for name, figure in figures.items()}, count.item())
    assert described["dropped"] == pytest.approx({"0": 4 / 17, "2": 4 / 17})
    shares = np.array([13, 4]) / 17
    assert described["load_entropy"]["0"] == pytest.approx(-(shares * np.log2(shares)).sum())


def test_learning_leaves_language_alone() -> None:
    """A few steps of stage 3 make the answers about pictures likelier, and change no word without one, bit for bit."""
    model = tiny_model(config=CONFIG)
    words = mx.array(np.random.default_rng(0).integers(3, 300, (1, 30)))
    before = model(words)
    mx.eval(before)
    model.train()
    set_allocation(model, ImgGBPR())
    select(model, ["moe"])
    batch = collate([example(0), example(1), example(2, images=0)], pad_id=0)
    optimizer = optimizers.Adam(3e-2)
    losses = []
    for _ in range(20):
        value, _, found = gradients(model, batch, AnswerLoss())
        optimizer.update(model, tree_unflatten(list(found.items())))
        mx.eval(model.parameters(), optimizer.state, value)
        losses.append(value.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    model.eval()
    assert mx.array_equal(model(words), before)
