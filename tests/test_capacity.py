"""Capacity and token dropping, and the Gumbel second expert, against DeepSpeed's gates in PyTorch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from deepspeed_gate import Gate, deal, gate, in_turn, moe_layer, num_slots, top1gating, top2gating
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from torch_reference import TEXT, moe_pair, relative_error, tokens, weights

from gm_mlx.capacity import Capacity, set_capacity
from gm_mlx.cpu import networks, speed_up
from gm_mlx.errors import UserError
from gm_mlx.moe import SparseMLP, set_gumbel
from gm_mlx.router import Positions, Routing, choose, load_balancing_loss, weigh

# Quarters: ties are common, and logits that differ have probabilities that differ.
tied_logits = st.integers(0, 2**32 - 1).map(np.random.default_rng)
factors = st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0])
cases = given(
    random=tied_logits,
    tokens=st.integers(1, 200),
    num_experts=st.integers(2, 8),
    factor=factors,
    min_capacity=st.sampled_from([0, 0, 1, 4]),
)


def quarters(random: np.random.Generator, tokens: int, num_experts: int) -> np.ndarray:
    """Logits of which some experts are everyone's darlings, so that there are tokens to drop."""
    values = random.integers(-8, 9, (tokens, num_experts)) + random.integers(-4, 5, num_experts)
    return (values / 4).astype(np.float32)


def ours(
    logits: np.ndarray, top_k: int, norm: bool, limit: Capacity, noise: np.ndarray | None = None, real: Any = None
) -> Routing:
    given_logits = mx.array(logits)
    probabilities, experts, _ = choose(given_logits, top_k, norm, None if noise is None else mx.array(noise))
    kept = limit.deal(probabilities, experts, real)
    return Routing(0, probabilities, experts, weigh(probabilities, experts, norm, kept), given_logits, kept)


def assert_equal(routing: Routing, expected: Gate) -> None:
    tokens = len(routing.experts)
    np.testing.assert_array_equal(routing.experts, expected.experts)
    assert routing.kept is not None
    np.testing.assert_array_equal(routing.kept, expected.kept)
    per_choice = expected.combine.sum(dim=2).gather(1, expected.experts)  # the k experts of a token are different ones
    np.testing.assert_allclose(routing.weights, per_choice, rtol=1e-6, atol=1e-7)
    assert ((expected.combine > 0).sum(dim=0) <= 1).all(), "two tokens in one slot"
    assert load_balancing_loss([routing]).item() == pytest.approx(expected.aux.item(), rel=1e-5)
    assert tokens == len(expected.kept)


@cases
def test_top2_by_position_is_deepspeeds(
    random: np.random.Generator, tokens: int, num_experts: int, factor: float, min_capacity: int
) -> None:
    logits = quarters(random, tokens, num_experts)
    for noise in (None, quarters(random, tokens, num_experts)):
        expected = top2gating(
            torch.from_numpy(logits), factor, min_capacity, None if noise is None else torch.from_numpy(noise)
        )
        assert_equal(ours(logits, 2, True, Capacity(factor, min_capacity), noise), expected)


@cases
def test_top1_by_lottery_is_deepspeeds(
    random: np.random.Generator, tokens: int, num_experts: int, factor: float, min_capacity: int
) -> None:
    logits = quarters(random, tokens, num_experts)
    mx.random.seed(tokens)
    found = ours(logits, 1, False, Capacity(factor, min_capacity, by="random"))
    mx.random.seed(tokens)  # the same draws, of which the smallest are served first: DeepSpeed serves the largest
    uniform = 1 - np.array(mx.random.uniform(shape=(tokens,)))
    assert_equal(found, top1gating(torch.from_numpy(logits), factor, min_capacity, torch.from_numpy(uniform)))


@pytest.mark.parametrize("by", ["position", "priority"])
@pytest.mark.parametrize("norm", [True, False])
@given(data=st.data(), random=tied_logits, tokens=st.integers(1, 60), num_experts=st.integers(2, 8), factor=factors)
def test_any_number_of_choices(
    by: Any, norm: bool, data: st.DataObject, random: np.random.Generator, tokens: int, num_experts: int, factor: float
) -> None:
    """Choice ranks in order, in each of them tokens by position, or the surest first (V-MoE, algorithms 1 and 2)."""
    top_k = data.draw(st.integers(1, num_experts))
    logits = quarters(random, tokens, num_experts)
    p = torch.softmax(torch.from_numpy(logits), dim=1)
    experts = torch.from_numpy(np.argsort(-logits, axis=1, kind="stable")[:, :top_k].copy())
    surest = p.max(dim=1).values.tolist()
    order = sorted(range(tokens), key=lambda s: -surest[s]) if by == "priority" else range(tokens)
    slots = num_slots(tokens, num_experts, top_k * factor, 0)
    places = deal(experts, in_turn(order, top_k), num_experts, slots)
    assert_equal(ours(logits, top_k, norm, Capacity(factor, by=by)), gate(p, experts, places, slots, norm))


@pytest.mark.parametrize("by", ["position", "random", "priority"])
@cases
def test_padding_takes_no_room(
    by: Any, random: np.random.Generator, tokens: int, num_experts: int, factor: float, min_capacity: int
) -> None:
    logits = quarters(random, tokens, num_experts)
    real = random.random(tokens) < 0.7
    limit = Capacity(factor, min_capacity, by)
    found = ours(logits, 2, True, limit, real=mx.array(real))
    assert found.kept is not None
    assert not np.array(found.kept)[~real].any()
    if real.any() and by != "random":
        alone = ours(logits[real], 2, True, limit)
        np.testing.assert_array_equal(np.array(found.kept)[real], alone.kept)
        np.testing.assert_array_equal(np.array(found.weights)[real], alone.weights)


def test_padding_counts_when_asked() -> None:
    logits = quarters(np.random.default_rng(0), 40, 4)
    real = mx.arange(40) < 20
    with_padding = ours(logits, 2, True, Capacity(0.5, padding=True), real=real)
    assert_equal(with_padding, top2gating(torch.from_numpy(logits), 0.5, 0))


@pytest.mark.parametrize("by", ["position", "random", "priority"])
@cases
def test_no_choice_is_dropped_while_there_is_room(
    by: Any, random: np.random.Generator, tokens: int, num_experts: int, factor: float, min_capacity: int
) -> None:
    logits = quarters(random, tokens, num_experts)
    found = ours(logits, 2, True, Capacity(factor, min_capacity, by))
    experts, kept = np.array(found.experts), np.array(found.kept)
    slots = num_slots(tokens, num_experts, 2 * factor, min_capacity)
    for expert in range(num_experts):
        assert kept[experts == expert].sum() == min((experts == expert).sum(), slots)
        if not kept[:, 0][experts[:, 0] == expert].all():  # a first choice was dropped: no second one has its place
            assert not kept[:, 1][experts[:, 1] == expert].any()
    if factor * 2 >= num_experts:
        assert kept.all()


def test_priority_keeps_the_surest_wherever_they_stand() -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=(90, 4)).astype(np.float32)
    shuffled = random.permutation(90)
    kept = ours(logits, 2, True, Capacity(0.5, by="priority")).kept
    moved = ours(logits[shuffled], 2, True, Capacity(0.5, by="priority")).kept
    np.testing.assert_array_equal(np.array(kept)[shuffled], moved)
    assert not np.array_equal(kept, ours(logits, 2, True, Capacity(0.5)).kept)


def test_the_lottery_is_fair_and_repeatable() -> None:
    logits = mx.zeros((8, 2))
    probabilities, experts, _ = choose(logits, 1, False)  # all want the first expert, which has room for 4 of them
    limit = Capacity(1.0, by="random")
    mx.random.seed(5)
    draws = np.stack([np.array(limit.deal(probabilities, experts))[:, 0] for _ in range(400)])
    assert (draws.sum(axis=1) == 4).all()
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.1)  # four standard deviations
    mx.random.seed(5)
    np.testing.assert_array_equal(limit.deal(probabilities, experts)[:, 0], draws[0])


@pytest.mark.parametrize("by", ["position", "priority"])
def test_nothing_comes_to_the_host(by: Any) -> None:
    """Inside ``mx.compile`` an array without a value cannot be read."""
    logits, real = quarters(np.random.default_rng(1), 30, 4), mx.arange(30) < 25

    def kept(logits: mx.array, real: mx.array) -> mx.array:
        probabilities, experts, _ = choose(logits, 2, True)
        return Capacity(0.5, by=by).deal(probabilities, experts, real)

    np.testing.assert_array_equal(mx.compile(kept)(mx.array(logits), real), kept(mx.array(logits), real))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"factor": 0}, "capacity factor 0: must be above 0"),
        ({"factor": float("nan")}, "must be above 0"),
        ({"min_capacity": -1}, "min_capacity -1: must not be below 0"),
        ({"by": "size"}, r"capacity by 'size': is not one of \['position', 'random', 'priority'\]"),
    ],
)
def test_wrong_limits_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Capacity(**wrong)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("factor", [0.3, 0.75])
def test_layer_equals_deepspeeds_with_its_gradients(
    factor: float, gumbel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, reference = moe_pair()
    set_capacity(layer, Capacity(factor))
    set_gumbel(layer, gumbel)
    noise = np.random.default_rng(2).gumbel(size=(2, 30, 4)).astype(np.float32)
    monkeypatch.setattr(mx.random, "gumbel", lambda shape: mx.array(noise).reshape(shape))
    x, target = tokens(2, 30), np.random.default_rng(9).normal(size=(2, 30, TEXT.hidden_size)).astype(np.float32)

    def loss(layer: SparseMLP, x: mx.array) -> mx.array:
        trace: list[Routing] = []
        return (layer(x, trace) - mx.array(target)).square().mean() + 0.5 * load_balancing_loss(trace)

    gradients = dict(tree_flatten(nn.value_and_grad(layer, loss)(layer, mx.array(x))[1]))
    input_gradient = mx.grad(lambda x: loss(layer, x))(mx.array(x))

    theirs = torch.from_numpy(x).requires_grad_()
    flat = theirs.reshape(60, -1)
    decided = top2gating(reference.gate(flat), factor, 0, torch.from_numpy(noise).reshape(60, 4) if gumbel else None)
    y = moe_layer(flat, decided, list(reference.experts))
    assert (~decided.kept).any(dim=1).sum() > 10
    assert relative_error(layer(mx.array(x)).reshape(60, -1), y) <= 1e-4
    ((y - torch.from_numpy(target).reshape(60, -1)).square().mean() + 0.5 * decided.aux).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    expected = weights(reference)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) <= 1e-4, name
    assert theirs.grad is not None
    assert relative_error(input_gradient, theirs.grad) <= 1e-4


def test_a_token_without_any_expert_makes_nothing() -> None:
    layer, _ = moe_pair(num_experts=2, top_k=1, norm_topk_prob=False)
    set_capacity(layer, Capacity(0.5))
    trace: list[Routing] = []
    y = np.array(layer(mx.array(tokens(1, 40)), trace))
    assert trace[0].kept is not None
    dropped = ~np.array(trace[0].kept)[..., 0]
    assert dropped.any()
    assert (y[dropped] == 0).all()
    assert (np.abs(y[~dropped]).max(axis=1) > 0).all()


def test_only_training_drops_unless_evaluation_is_asked_for() -> None:
    layer, _ = moe_pair()
    x = mx.array(tokens(1, 50))
    unlimited = layer(x)
    set_capacity(layer, Capacity(0.3))
    limited = layer(x)
    assert not np.allclose(limited, unlimited)
    layer.eval()
    np.testing.assert_array_equal(layer(x), unlimited)
    set_capacity(layer, Capacity(0.3, in_eval=True))
    np.testing.assert_array_equal(layer(x), limited)
    set_capacity(layer, None)
    np.testing.assert_array_equal(layer.train()(x), unlimited)


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="GPUs have kernels of their own")
def test_fast_experts_leave_out_what_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, rows = [moe_pair()[0] for _ in range(2)], []
    for layer in layers:
        nn.quantize(layer, group_size=32, bits=4)
        set_capacity(layer, Capacity(0.4, by="priority"))
    speed_up(layers[1])
    forward = networks.Network.forward
    monkeypatch.setattr(networks, "pays", lambda *_: True)
    monkeypatch.setattr(
        networks.Network, "forward", lambda net, x, keep: (rows.append(len(x)), forward(net, x, keep))[1]
    )
    x, trace = mx.array(tokens(2, 40)), []
    stock, fast = (mx.value_and_grad(lambda x, m=m: m(x, trace).square().sum())(x) for m in layers)
    for ours, theirs in zip(fast, stock, strict=True):
        assert relative_error(ours, np.array(theirs)) < 1e-5
    assert sum(rows) == trace[0].kept.sum().item() < 160


def test_gumbel_draws_second_experts_by_what_the_first_leaves_over() -> None:
    layer, _ = moe_pair()
    logits = mx.broadcast_to(mx.array([1.0, 0.0, 2.0, -1.0]), (1, 20_000, 4))
    layer.gate = lambda x: logits  # type: ignore[assignment]

    def chosen() -> np.ndarray:
        return np.array(layer.route(logits, Positions()).experts)[0]

    assert (chosen() == [2, 0]).all(), "off by default"
    set_gumbel(layer, True)
    shares = np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    for training in (True, False):  # DeepSpeed draws in evaluation too
        layer.train(training)
        mx.random.seed(7)
        experts = chosen()
        assert (experts[:, 0] == 2).all()
        found = np.bincount(experts[:, 1], minlength=4)[[0, 1, 3]] / len(experts)
        np.testing.assert_allclose(found, shares, atol=0.015)  # four standard deviations
        assert not np.array_equal(experts, chosen())
        mx.random.seed(7)
        np.testing.assert_array_equal(experts, chosen())
    for training in (True, False):
        set_gumbel(layer.train(training), True, in_eval=False)
        assert (chosen() != [2, 0]).any() == training
    set_gumbel(layer.train(), False)
    assert (chosen() == [2, 0]).all()
