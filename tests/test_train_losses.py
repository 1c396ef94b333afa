"""The loss on answers: its parts against their formulas in float64, what it tells a log, and the memory it takes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fixtures import IMAGE_TOKEN, tiny_config, tiny_model
from mlx.utils import tree_flatten

from gm_mlx.capacity import Capacity, set_capacity
from gm_mlx.config import MoEConfig
from gm_mlx.model import Model
from gm_mlx.router import Routing, choose, load_balancing_loss, router_z_loss
from gm_mlx.train import cross_entropy
from gm_mlx.train.data import Batch, Example, collate
from gm_mlx.train.losses import AnswerLoss


def batch_of(*lengths: int, images: int = 0, seed: int = 0) -> Batch:
    """Rows whose last four tokens are learnt; the first has the images."""
    random = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate(lengths):
        count = 0 if row else images
        ids = [*[IMAGE_TOKEN] * (4 * count), *random.integers(4, 300, length)]
        pixels = random.normal(size=(count, 16, 16, 3)).astype(np.float32) if count else None
        examples.append(Example(ids, np.arange(len(ids)) >= len(ids) - 4, pixels))
    return collate(examples, pad_id=0)


def routings(random: np.random.Generator, layers: int, rows: int, length: int, num_experts: int) -> list[Routing]:
    trace = []
    for layer in range(layers):
        logits = mx.array(random.normal(size=(rows, length, num_experts)) * 2, mx.float32)
        trace.append(Routing(layer, *choose(logits, 2, True), logits))
    return trace


@pytest.mark.parametrize("length", [1, 50, 5000])
@pytest.mark.parametrize("num_experts", [2, 4, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_router_losses_equal_their_formulas(num_experts: int, length: int, padded: bool) -> None:
    """Of DeepSpeed's l_aux, summed over layers, and of ST-MoE's eq. 5."""
    random = np.random.default_rng(length + num_experts)
    trace = routings(random, 3, 2, length, num_experts)
    real = random.random((2, length)) < 0.8 if padded else np.ones((2, length), bool)
    balance = router_z = 0.0
    for routing in trace:
        logits = np.array(routing.logits, np.float64)[real]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        first = np.eye(num_experts)[logits.argmax(axis=1)]
        balance += num_experts * (p.mean(axis=0) * first.mean(axis=0)).sum()
        router_z += (np.log(np.exp(logits).sum(axis=1)) ** 2).mean()
    mask = mx.array(real) if padded else None
    assert load_balancing_loss(trace, mask).item() == pytest.approx(balance, rel=1e-6)
    assert router_z_loss(trace, mask).item() == pytest.approx(router_z, rel=1e-6)


def test_router_losses_of_no_layer_and_of_padding_alone() -> None:
    trace = routings(np.random.default_rng(0), 2, 1, 9, 4)
    for loss in (load_balancing_loss, router_z_loss):
        assert loss([]).item() == 0
        assert loss(trace, mx.zeros((1, 9), mx.bool_)).item() == 0


def traced(model: Model, batch: Batch) -> list[Routing]:
    trace: list[Routing] = []
    features = None if batch.pixels is None else model.encode_images(batch.pixels)
    model.hidden(model.embed(batch.ids, features), trace=trace)
    return trace


def test_the_total_is_the_sum_of_its_parts() -> None:
    model, batch = tiny_model(config=tiny_config(moe=MoEConfig(mode="dense", aux_loss_coef=0.25))), batch_of(9, 14)
    trace, real = traced(model, batch), mx.array(batch.real)
    for loss, aux, z in ((AnswerLoss(), 0.25, 0.0), (AnswerLoss(0.5, 0.125), 0.5, 0.125), (AnswerLoss(0.0), 0.0, 0.0)):
        total, count, figures = loss(model, batch)
        assert count.item() == 8
        assert figures["positions"].item() == 9 + 14
        assert figures["balance"].item() == pytest.approx(8 * load_balancing_loss(trace, real).item(), rel=1e-5)
        assert figures["router_z"].item() == pytest.approx(8 * router_z_loss(trace, real).item(), rel=1e-5)
        parts = figures["answers"] + aux * figures["balance"] + z * figures["router_z"]
        assert total.item() == pytest.approx(parts.item(), rel=1e-6)


def test_loads_count_every_choice_of_real_positions() -> None:
    model, batch = tiny_model(config=tiny_config(moe=MoEConfig(mode="dense"))), batch_of(9, 14, images=2)
    trace = traced(model, batch)
    _, count, figures = AnswerLoss()(model, batch)
    assert figures["positions"].item() == 9 + 8 + 14
    for layer, routing in enumerate(trace):
        chosen = np.array(routing.experts)[batch.real].reshape(-1)
        np.testing.assert_array_equal(figures[f"load.{layer}"], np.bincount(chosen, minlength=4))
        assert figures[f"dropped.{layer}"].item() == 0
    said = AnswerLoss().describe({name: np.array(value) for name, value in figures.items()}, count.item())
    assert said.keys() == {"answer_loss", "balance_loss", "router_z_loss", "load_entropy", "dropped"}
    assert said["load_entropy"].keys() == said["dropped"].keys() == {"0", "1"}


def test_dropped_choices_are_counted() -> None:
    model, batch = tiny_model(), batch_of(30, 20)
    set_capacity(model.train(), Capacity(0.5))
    _, count, figures = AnswerLoss()(model, batch)
    load, dropped = (np.array(figures[name]) for name in ("load.0", "dropped.0"))
    room = 13  # half of 50 tokens with 2 choices over 4 experts, rounded up
    assert dropped == np.maximum(load - room, 0).sum() > 0
    assert load.sum() == 100
    described = AnswerLoss().describe({name: np.array(value) for name, value in figures.items()}, count.item())
    assert described["dropped"]["0"] == pytest.approx(dropped / 100)


@pytest.mark.parametrize(
    ("load", "entropy"),
    [([5, 5, 5, 5], 1.0), ([0, 9, 0, 0], 0.0), ([4, 4, 0, 0], 0.5), ([0, 0, 0, 0], 1.0), ([7], 1.0)],
)
def test_load_entropy(load: list[float], entropy: float) -> None:
    figures = {"load.12": np.array(load), "dropped.12": np.array(2.0)}
    described = AnswerLoss().describe(figures, 0)
    assert described["load_entropy"] == {"12": pytest.approx(entropy)}
    assert described["dropped"] == {"12": 2 / max(sum(load), 1)}


def test_a_dense_model_has_answers_only() -> None:
    model, batch = tiny_model(config=tiny_config(moe=None)), batch_of(9)
    total, count, figures = AnswerLoss(1.0, 1.0)(model, batch)
    assert figures.keys() == {"positions", "answers"}
    assert total.item() == figures["answers"].item()
    described = AnswerLoss().describe({"positions": np.array(9), "answers": np.array(6.0)}, count.item())
    assert described == {"answer_loss": 1.5}


@pytest.mark.parametrize("moe", [None, MoEConfig()])
def test_nothing_to_learn_is_zero_in_the_same_figures(moe: MoEConfig | None) -> None:
    """A rank without rows takes part in a step with a row that counts for nothing."""
    model = tiny_model(config=tiny_config(moe=moe))
    batch = batch_of(9, 14, images=1)
    empty = batch._replace(learnt=np.zeros_like(batch.learnt))
    set_capacity(model.train(), Capacity(0.5))
    (total, count, figures), gradients = nn.value_and_grad(model, AnswerLoss())(model, empty)
    _, _, usual = AnswerLoss()(model, batch)
    assert total.item() == count.item() == 0
    assert {name: value.shape for name, value in figures.items()} == {name: v.shape for name, v in usual.items()}
    for name, value in [*tree_flatten(figures), *tree_flatten(gradients)]:
        assert not np.array(value).any(), name


def test_figures_add_up_over_parts() -> None:
    """Without balance, which is a product of means, rows may be learnt from in parts."""
    model, batch = tiny_model(), batch_of(9, 14)
    total, count, whole = AnswerLoss(0.0)(model, batch)
    parts = [AnswerLoss(0.0)(model, Batch(*(array[row : row + 1] for array in batch[:3]), None)) for row in (0, 1)]
    assert count.item() == sum(part[1].item() for part in parts)
    assert total.item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-5)
    for name in ("positions", "answers", "load.0"):
        np.testing.assert_allclose(whole[name], parts[0][2][name] + parts[1][2][name], rtol=1e-5)


@pytest.mark.parametrize(
    ("tied", "learns", "quantized"),
    [(True, True, False), (False, True, False), (True, False, False), (True, False, True), (False, False, True)],
)
def test_logits_in_pieces_take_less_memory(
    tied: bool, learns: bool, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary of 50,000, 200 learnt tokens have 40 MB of logits, of which the plain way holds four copies."""
    vocab, tokens = 50_000, 500 if learns else 200
    model = Model(tiny_config(vocab_size=vocab, tie_word_embeddings=tied))
    if quantized:
        head = "embed_tokens" if tied else "lm_head"
        nn.quantize(model, group_size=64, bits=4, class_predicate=lambda path, _: head in path)
    if not learns:
        model.freeze()
    hidden = mx.random.normal((tokens, 64), key=mx.random.key(0))
    targets = mx.random.randint(0, vocab, (tokens,), key=mx.random.key(1))
    mx.eval(model.parameters(), hidden, targets)

    def measured(logits: int) -> tuple[float, Any, int]:
        monkeypatch.setattr(cross_entropy, "LOGITS", logits)

        def loss(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
            model.update(parameters)
            return cross_entropy.cross_entropy(model, hidden, targets)

        before = mx.get_active_memory()
        mx.reset_peak_memory()
        parameters = model.trainable_parameters()
        value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(parameters, hidden)
        mx.eval(value, gradients)
        model.update(parameters)
        return value.item(), gradients, mx.get_peak_memory() - before

    value, gradients, whole = measured(tokens * vocab)
    again, others, pieces = measured(10 * vocab)
    assert again == pytest.approx(value, rel=1e-5)
    flat, flat_others = dict(tree_flatten(gradients)), dict(tree_flatten(others))
    assert flat.keys() == flat_others.keys()
    for name, gradient in flat.items():
        np.testing.assert_allclose(gradient, flat_others[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert whole > 150e6
    # Where the head learns, its own gradient of 13 MB is held some times, and pieces are as large as it is.
    assert pieces < whole * (0.5 if learns else 0.2)
