"""Eve's elastic FFN: who goes where, in training and out of it, and that language is untouched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from eve_models import CONFIG, DENSE, TEXT
from fixtures import tiny_model
from mlx.utils import tree_flatten
from torch_reference import relative_error

from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.evf import LANGUAGE, VISION, ElasticFFN, ImgGBPR, balance_loss, set_allocation
from gm_mlx.model import Model
from gm_mlx.presets import EVF
from gm_mlx.router import Positions, Routing
from gm_mlx.weights import named_arrays

SIZE = TEXT.hidden_size


def layer_of(index: int = 2, **moe: Any) -> ElasticFFN:
    """A layer with random weights; of index 0 with second gates."""
    mx.random.seed(index)
    layer = ElasticFFN(TEXT, replace(EVF, **moe), index)
    layer.gate.weight = mx.random.normal((2, SIZE))
    layer.eval()
    return layer


def tokens(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(1).normal(size=(*shape, SIZE)).astype(np.float32))


def mask(*rows: str) -> mx.array:
    """``mask("..##")``: two positions of text, then two of an image."""
    return mx.array([[mark == "#" for mark in row] for row in rows])


def by_hand(layer: ElasticFFN, x: mx.array, image: mx.array, priority: float = 1.0) -> np.ndarray:
    """Token by token, in NumPy but for the networks: S = P + 1 at a position's own FFN, and the output times P."""
    logits = np.array(x) @ np.array(layer.gate.weight).T
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    y = np.stack([np.array(layer.language_ffn(x)), np.array(layer.vision_ffn(x))], axis=2)  # [B, L, 2, D]
    out = np.empty_like(np.array(x))
    for row, column in np.ndindex(*p.shape[:2]):
        own = int(np.array(image)[row, column])
        priorities = p[row, column].copy()
        priorities[own] += priority
        best = own if priorities[own] >= priorities[1 - own] else 1 - own
        out[row, column] = p[row, column, best] * y[row, column, best]
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("priority", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("rows", [("...####.", "##......"), ("####",), ("....",), (".",), ("#",)])
def test_equals_the_rule(rows: tuple[str, ...], index: int, priority: float, training: bool) -> None:
    layer, image = layer_of(index, modality_priority=priority), mask(*rows)
    layer.train(training)
    x, trace = tokens(*image.shape), []
    y = layer(x, trace, Positions(image=image))
    assert relative_error(y, by_hand(layer, x, image, priority)) <= 1e-5
    if priority == 1:
        assert trace[0].experts.squeeze(-1).tolist() == image.astype(mx.int32).tolist()


def test_without_a_priority_the_router_alone_decides() -> None:
    layer, image = layer_of(modality_priority=0.0), mask(".#" * 40)
    routing = layer.route(layer.gate(tokens(1, 80)), Positions(image=image))
    assert routing.experts.squeeze(-1).tolist() == mx.argmax(routing.probabilities, axis=-1).tolist()
    assert 10 < routing.experts.sum().item() < 70


def test_a_weight_of_one_is_a_choice_of_the_config() -> None:
    layer, x = layer_of(norm_topk_prob=True), tokens(1, 6)
    y = layer(x, None, Positions(image=mask("......")))
    assert relative_error(y, np.array(layer.language_ffn(x))) <= 1e-6


@pytest.mark.parametrize("positions", [None, Positions(), Positions(real=mx.array([[True] * 6]))])
def test_without_images_router_and_vision_ffn_are_not_even_looked_at(positions: Positions | None) -> None:
    layer, x = layer_of(), tokens(1, 6)
    wanted = layer.language_ffn(x)
    layer.gate = layer.vision_ffn = None
    trace: list[Routing] = []
    assert mx.array_equal(layer(x, trace, positions), wanted)
    assert trace[0].experts.tolist() == [[[LANGUAGE]] * 6] and trace[0].weights.tolist() == [[[1.0]] * 6]


@pytest.mark.parametrize("training", [False, True])
def test_rows_without_images_are_plain_beside_rows_with_some(training: bool) -> None:
    layer, x = layer_of(), tokens(2, 6)
    layer.train(training)
    layer.allocation = ImgGBPR(capacity_factor=1.0, moved=0.0)
    trace: list[Routing] = []
    y = layer(x, trace, Positions(image=mask("..##..", "......"), pictured=mx.array([True, False])))
    assert relative_error(y[1], np.array(layer.language_ffn(x)[1])) <= 1e-6
    assert trace[0].weights[1].tolist() == [[1.0]] * 6
    assert not mx.array_equal(y[0], layer.language_ffn(x)[0])


# The whole model -----------------------------------------------------------------------------------------------------


def twins() -> tuple[Model, Model]:
    """An Eve, and the plain language model that it was before it had vision FFNs."""
    eve = tiny_model(config=CONFIG)
    dense = Model(DENSE)
    arrays = named_arrays(eve)
    dense.load_weights(
        [
            (name.replace(".language_ffn", ""), array)
            for name, array in arrays.items()
            if ".vision_ffn." not in name and ".mlp.gate." not in name
        ],
        strict=True,
    )
    dense.eval()
    return eve, dense


def test_language_is_what_it_was_bit_for_bit() -> None:
    eve, dense = twins()
    ids = mx.array(np.random.default_rng(0).integers(3, 300, (2, 40)))
    assert mx.array_equal(eve(ids), dense(ids))
    positions = eve.positions(np.array(ids))
    assert positions.image is None
    assert mx.array_equal(eve(ids, positions=positions), dense(ids))


def test_a_picture_makes_a_difference_to_every_later_word() -> None:
    eve, dense = twins()
    ids = np.full((1, 12), 7)
    ids[:, 2:6] = CONFIG.image_token_index
    pixels = mx.random.normal((1, 32, 32, 3), key=mx.random.key(0))
    x = eve.embed(ids, eve.encode_images(pixels))
    routed, plain = eve.hidden(x, positions=eve.positions(ids)), dense.hidden(x)
    assert (mx.abs(routed - plain).max(axis=-1) > 1e-3).all()


def test_positions_of_prompts() -> None:
    model = Model(CONFIG)
    image, text = CONFIG.image_token_index, 7
    both = model.positions(np.array([[text, image], [text, text]]))
    assert both.image is not None and both.image.tolist() == [[False, True], [False, False]]
    assert both.pictured is not None and both.pictured.tolist() == [True, False]
    assert model.positions(np.array([[text, image]])).pictured is None
    assert model.positions(np.array([[text, text]])) == Positions()
    later = both.next_token()
    assert later.image is not None and later.image.tolist() == [[False], [False]]
    assert later.pictured is both.pictured and later.real is None
    assert Positions().next_token() == Positions()
    part = model.positions(np.array([[text, image, text]]), mx.array([[True, True, False]])).part(1, 3)
    assert part.image is not None and part.image.tolist() == [[True, False]]
    assert part.real is not None and part.real.tolist() == [[True, False]]


# Allocation in training ----------------------------------------------------------------------------------------------


def allocated(
    allocation: ImgGBPR, priorities: np.ndarray, counted: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    scores = mx.array(priorities.astype(np.float32))
    counted = np.ones(priorities.shape[:2], bool) if counted is None else counted
    chosen = mx.argmax(scores, axis=-1)
    ffns, kept = allocation.allocate(scores, chosen, mx.array(counted))
    return np.array(ffns), np.array(kept)


def random_priorities(seed: int, images: float, shape: tuple[int, int] = (4, 50)) -> np.ndarray:
    """S(x) of positions of which a share are images."""
    random = np.random.default_rng(seed)
    p = random.uniform(0.05, 0.95, shape)
    own = (random.uniform(size=shape) < images).astype(int)
    return np.stack([p, 1 - p], axis=-1) + np.eye(2)[own]


@pytest.mark.parametrize("images", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("moved", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1.0, 1.2, 1.5, 2.0])
def test_img_gbpr(factor: float, moved: float, images: float) -> None:
    """The C highest priorities of the whole batch stay; of the rest a share goes to the other FFN, and the rest out."""
    priorities = random_priorities(3, images)
    ffns, kept = allocated(ImgGBPR(factor, moved), priorities)
    wanted, total = priorities.argmax(axis=-1), priorities.shape[0] * priorities.shape[1]
    capacity = int(np.ceil(factor * total / 2))
    for ffn in (LANGUAGE, VISION):
        asking = wanted == ffn
        order = np.sort(priorities[..., ffn][asking])[::-1]
        served = asking & kept & (ffns == ffn)
        assert served.sum() == min(asking.sum(), capacity)
        if asking.sum() > capacity:
            assert np.array_equal(np.sort(priorities[..., ffn][served])[::-1], order[:capacity])
        over = max(asking.sum() - capacity, 0)
        assert (asking & kept & (ffns != ffn)).sum() == np.rint(moved * over)
        assert (asking & ~kept).sum() == over - np.rint(moved * over)
        assert (kept & (ffns == ffn)).sum() <= capacity


def test_all_that_go_to_one_ffn_lose_a_quarter_as_the_paper_saw() -> None:
    """With C = 1.5 and everything at one FFN, 25 % are dropped, unless some are sent to the other."""
    priorities = random_priorities(0, 1.0)
    assert (~allocated(ImgGBPR(1.5, 0.0), priorities)[1]).mean() == 0.25
    assert (~allocated(ImgGBPR(1.5, 1.0), priorities)[1]).mean() == 0.0


def test_padding_takes_no_place() -> None:
    priorities = random_priorities(1, 1.0, (2, 20))
    counted = np.zeros((2, 20), bool)
    counted[0, :10] = True
    ffns, kept = allocated(ImgGBPR(1.0, 0.0), priorities, counted)
    assert kept[~counted].all() and (kept & counted).sum() == 5
    assert np.array_equal(ffns, priorities.argmax(axis=-1))


def test_lots_depend_on_the_step_and_are_the_same_when_it_is_computed_again() -> None:
    first = random_priorities(0, 1.0)
    again = [allocated(ImgGBPR(1.0, 0.5), first)[0] for _ in range(2)]
    assert np.array_equal(*again)
    # The smallest change of one number draws other lots, each as likely as any other.
    drawn = np.zeros(first.shape[:2])
    for step in range(200):
        later = first.copy()
        later[0, 0] += 1e-6 * step
        drawn += allocated(ImgGBPR(1.0, 0.5), later)[0] != later.argmax(axis=-1)
    over = drawn > 0
    assert over.sum() == pytest.approx(100, abs=2)  # half of 200 find no room
    assert drawn[over].min() > 70 and drawn[over].max() < 130


@pytest.mark.parametrize("values", [{"capacity_factor": 0.9}, {"moved": 1.1}, {"moved": -0.1}])
def test_impossible_allocations_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(values))}: "):
        ImgGBPR(**values)


def test_a_layer_allocates_in_training_only() -> None:
    layer, x, image = layer_of(), tokens(2, 20), mask("#" * 20, "#" * 20)
    layer.allocation = ImgGBPR(1.5, 0.0)
    everything = layer(x, None, Positions(image=image))
    assert (mx.abs(everything).max(axis=-1) > 0).all()
    layer.train()
    trace: list[Routing] = []
    y = layer(x, trace, Positions(image=image))
    kept = trace[0].kept
    assert kept is not None and (~kept).sum().item() == 10
    gone = np.array(~kept[..., 0])
    assert (np.array(y)[gone] == 0).all()
    assert relative_error(mx.array(np.array(y)[~gone]), np.array(everything)[~gone]) <= 1e-5
    # The ones with the highest P at the vision FFN stayed, wherever they stand in the batch.
    p = np.array(trace[0].probabilities[..., VISION])
    assert p[~gone].min() >= p[gone].max()


def test_gradients_with_an_allocation() -> None:
    """Only the chosen FFN learns from a position, the router from its weight, and a checkpoint changes nothing."""
    layer, x = layer_of(), tokens(2, 20)
    layer.train()
    layer.allocation = ImgGBPR(1.0, 0.5)
    positions = Positions(image=mask("#" * 20, "#" * 20))

    def loss(layer: ElasticFFN, x: mx.array) -> mx.array:
        return layer(x, None, positions).square().sum()

    plain = nn.value_and_grad(layer, lambda x: loss(layer, x))(x)[1]
    checked = nn.utils.checkpoint(layer, lambda x: layer(x, None, positions))
    again = nn.value_and_grad(layer, lambda x: checked(x).square().sum())(x)[1]
    flat = dict(tree_flatten(again))
    for name, gradient in tree_flatten(plain):
        assert mx.abs(gradient).max() > 0, name
        assert mx.array_equal(gradient, flat[name]), name


def test_the_balance_loss_is_the_paper_s() -> None:
    layer, x = layer_of(), tokens(2, 8)
    real, pictured = mask("######..", "########"), mx.array([True, False])
    positions = Positions(real, mask("..####..", "........"), pictured)
    trace: list[Routing] = []
    layer(x, trace, positions)
    p = np.array(trace[0].probabilities)[0, :6]
    # F: 2 of the row's 6 real positions are text, 4 are an image's.
    wanted = 2 / 6 * p[:, LANGUAGE].mean() + 4 / 6 * p[:, VISION].mean()
    assert balance_loss(trace, positions).item() == pytest.approx(wanted, rel=1e-6)
    assert balance_loss(trace * 3, positions).item() == pytest.approx(3 * wanted, rel=1e-6)
    assert balance_loss(trace, Positions(real)).item() == 0


def test_allocations_are_set_on_all_elastic_layers_of_a_model() -> None:
    model = Model(CONFIG)
    set_allocation(model, ImgGBPR())
    assert [getattr(block.mlp, "allocation", None) for block in model.layers] == [ImgGBPR(), None, ImgGBPR(), None]
    set_allocation(model, None)
    assert all(getattr(block.mlp, "allocation", None) is None for block in model.layers)
    with pytest.raises(UserError, match="no vision FFNs; make some with --upcycle evf"):
        set_allocation(Model(DENSE), ImgGBPR())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 4}, "text_config.moe.num_experts: 4 is not 2"),
        ({"top_k": 2}, "text_config.moe.top_k: 2 is not 1"),
        ({"use_residual": True}, "text_config.moe.use_residual: True is not False"),
        ({"expert_size": 32}, "text_config.moe.expert_size: 32 is not 0"),
        ({"kind": "elastic"}, "text_config.moe.kind: 'elastic' is not one of"),
        ({"modality_priority": -1.0}, "text_config.moe.modality_priority: -1.0 is not 0 or more"),
    ],
)
def test_what_is_no_elastic_ffn_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(EVF, **values)


def test_a_router_may_have_rank_one() -> None:
    layer = layer_of(modality_priority=0.0)
    low = ElasticFFN(TEXT, MoEConfig(**{**EVF.__dict__, "router_rank": 1}), 0)
    assert set(low.gate.parameters()) == {"u", "v"} and "weight" in layer.gate
