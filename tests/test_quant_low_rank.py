"""Low-rank routers of whole models: what is kept, what is reported, what is refused."""

from __future__ import annotations

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_config, tiny_model
from tensor_tables import model_of, tensors_of

from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.quant.low_rank import agreement, low_rank_routers, router_weight
from gm_mlx.router import low_rank
from gm_mlx.tensors import Tensor

GATE = "language_model.model.layers.{}.mlp.gate"
EXPERTS = 6


def config_of(rank: int = 0, experts: int = EXPERTS) -> ModelConfig:
    return tiny_config(moe=MoEConfig(num_experts=experts, mode="dense", router_rank=rank))


def inputs(seed: int = 0, tokens: int = 700) -> np.ndarray:
    """Activations [T, 64] whose channels differ in size by a factor of 100, and a few of which dwarf the rest."""
    random = np.random.default_rng(seed)
    scale = 10 ** random.uniform(-1, 1, 64)
    scale[:2] = 200
    return (random.normal(size=(tokens, 64)) * scale).astype(np.float32)


def centred(weight: np.ndarray) -> np.ndarray:
    return weight - weight.mean(axis=0)


def logit_error(weight: np.ndarray, factors: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> float:
    """Mean squared error of centred logits, in float64."""
    reduced = (factors[0].astype(np.float64) @ factors[1].astype(np.float64)).T
    return float(
        np.square(x.astype(np.float64) @ (centred(weight.astype(np.float64)) - centred(reduced)).T).sum(1).mean()
    )


def test_weighted_factors_are_the_best_for_their_inputs() -> None:
    random = np.random.default_rng(1)
    weight = random.normal(size=(EXPERTS, 64)) + 5 * random.normal(size=64)
    x = inputs()
    covariance = x.T.astype(np.float64) @ x / len(x)
    # The least error that a rank allows: the weakest eigenvalues of the centred logits' covariance.
    strengths = np.linalg.eigvalsh(centred(weight) @ covariance @ centred(weight).T)[::-1]
    for rank in range(1, EXPERTS):
        weighted = logit_error(weight, low_rank(weight, rank, covariance), x)
        assert weighted == pytest.approx(strengths[rank:].sum(), rel=1e-3, abs=1e-6 * strengths[0])
        if rank < EXPERTS - 1:
            assert weighted < 0.9 * logit_error(weight, low_rank(weight, rank), x)


@pytest.mark.parametrize("directions", [0, 1, 2])
def test_inputs_of_few_directions_are_no_trouble(directions: int) -> None:
    random = np.random.default_rng(2)
    weight = random.normal(size=(EXPERTS, 64)).astype(np.float32)
    x = random.normal(size=(50, directions)) @ random.normal(size=(directions, 64))
    covariance = x.T @ x / len(x)
    everything = np.eye(64)
    u, v = low_rank(weight, EXPERTS - 1, covariance)
    assert logit_error(weight, (u, v), everything) < 1e-9  # exact for any input, not for these alone
    if directions:
        assert logit_error(weight, low_rank(weight, directions, covariance), x) < 1e-9
    # What the inputs leave open, the weights decide.
    u, v = low_rank(weight, 3, covariance)
    assert np.isfinite(u).all()
    if not directions:
        assert logit_error(weight, (u, v), everything) == pytest.approx(
            logit_error(weight, low_rank(weight, 3), everything), rel=1e-4
        )


def test_a_router_of_equal_rows_gives_zero_factors() -> None:
    u, v = low_rank(np.ones((4, 8)), 2)
    assert np.abs(u @ v).max() < 1e-6
    u, v = low_rank(np.zeros((4, 8)), 3, np.eye(8))
    assert not (u @ v).any()


@pytest.mark.parametrize("calibrated", [False, True])
def test_rank_one_less_than_experts_is_reported_as_exact(calibrated: bool) -> None:
    model = tiny_model(config=config_of())
    x = {0: inputs(0), 1: inputs(1)}
    covariances = {i: rows.T.astype(np.float64) @ rows / len(rows) for i, rows in x.items()} if calibrated else None
    config, tensors, report = low_rank_routers(model.config, tensors_of(model), EXPERTS - 1, covariances, x)
    assert config.text_config.moe == dataclasses.replace(model.config.text_config.moe, router_rank=EXPERTS - 1)
    assert (report.rank, report.weighted, [layer.layer for layer in report.layers]) == (EXPERTS - 1, calibrated, [0, 1])
    for layer in report.layers:
        assert f"{layer.energy:.6%}" == "100.000000%"
        assert (layer.top1, layer.top2) == (1.0, 1.0)
    ids = mx.arange(40)[None]
    reduced = model_of(config, tensors)
    assert mx.allclose(reduced(ids), model(ids), rtol=0, atol=1e-4)


def test_routers_are_replaced_and_nothing_else() -> None:
    model = tiny_model(config=config_of())
    before = tensors_of(model, mx.bfloat16)
    _, after, report = low_rank_routers(model.config, before, 2)
    gates = {f"{GATE.format(i)}.{name}" for i in (0, 1) for name in "uv"}
    assert after.keys() - before.keys() == gates
    assert before.keys() - after.keys() == {f"{GATE.format(i)}.weight" for i in (0, 1)}
    assert all(after[name] is before[name] for name in after.keys() - gates)
    for name in gates:
        shape = (64, 2) if name.endswith("u") else (2, EXPERTS)
        array = after[name].read()
        assert (after[name].dtype, after[name].shape, array.dtype, array.shape) == ("F32", shape, mx.float32, shape)
    assert [(layer.top1, layer.top2) for layer in report.layers] == [(None, None)] * 2
    json.dumps(report.to_dict())


def test_the_report_says_what_is_lost() -> None:
    model = tiny_model(config=config_of())
    tensors = tensors_of(model)
    x = {0: inputs(0), 1: inputs(1)}
    covariances = {i: rows.T.astype(np.float64) @ rows / len(rows) for i, rows in x.items()}
    energies = []
    for rank in range(1, EXPERTS):
        _, reduced, report = low_rank_routers(model.config, tensors, rank, covariances, x)
        _, _, plain = low_rank_routers(model.config, tensors, rank, None, x)
        for layer in report.layers:
            full = router_weight(tensors, GATE.format(layer.layer))
            small = router_weight(reduced, GATE.format(layer.layer))
            rows = x[layer.layer].astype(np.float64)
            ours, theirs = rows @ full.T, rows @ small.T
            lost = np.square((ours - ours.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))).sum()
            kept = 1 - lost / np.square(ours - ours.mean(1, keepdims=True)).sum()
            assert layer.energy == pytest.approx(kept, abs=1e-6)
            first = np.mean(ours.argmax(1) == theirs.argmax(1))
            assert layer.top1 == pytest.approx(first, abs=2 / len(rows))
            pairs = [{*np.argsort(-a)[:2]} == {*np.argsort(-b)[:2]} for a, b in zip(ours, theirs, strict=True)]
            assert layer.top2 == pytest.approx(np.mean(pairs), abs=2 / len(rows))
        weight = router_weight(tensors, GATE.format(0))
        strengths = np.linalg.svd(centred(weight), compute_uv=False) ** 2
        assert plain.layers[0].energy == pytest.approx(strengths[:rank].sum() / strengths.sum(), abs=1e-6)
        energies.append(report.layers[0].energy)
        if rank == 1:
            assert report.layers[0].top1 < 0.95  # type: ignore[operator]
            assert sum(a.top1 > b.top1 for a, b in zip(report.layers, plain.layers, strict=True)) >= 1  # type: ignore[operator]
    assert energies == sorted(energies)


def test_equal_logits_are_the_same_choice() -> None:
    random = np.random.default_rng(3)
    rows = random.normal(size=(300, 64)).astype(np.float32)
    twins = np.repeat(random.normal(size=(2, 64)), 2, axis=0)
    noisy = twins + random.normal(size=twins.shape) * 1e-12
    assert agreement(twins, noisy, rows, 1) == agreement(twins, noisy, rows, 2) == 1.0
    assert agreement(twins, twins[[2, 1, 0, 3]] + [[0], [0], [0], [9]], rows, 1) < 1


def test_low_rank_routers_can_be_made_smaller() -> None:
    full = tiny_model(config=config_of())
    config, reduced, _ = low_rank_routers(full.config, tensors_of(full), EXPERTS - 1)
    _, directly, _ = low_rank_routers(full.config, tensors_of(full), 2)
    config, again, report = low_rank_routers(config, reduced, 2)
    assert config.text_config.moe is not None
    assert config.text_config.moe.router_rank == report.rank == 2
    assert again.keys() == directly.keys()
    for layer in (0, 1):
        a, b = (centred(router_weight(tensors, GATE.format(layer))) for tensors in (again, directly))
        assert np.abs(a - b).max() < 1e-5
    with pytest.raises(UserError, match=r"--router-rank 3: not between 1 and 2 .* have rank 2 already"):
        low_rank_routers(config, again, 3)
    assert low_rank_routers(config, again, 2)[2].layers[0].energy == pytest.approx(1)


@pytest.mark.parametrize("rank", [-1, 0, EXPERTS, 100])
def test_a_rank_outside_its_range_is_named(rank: int) -> None:
    model = tiny_model(config=config_of())
    with pytest.raises(UserError, match=f"--router-rank {rank}: not between 1 and 5 .* it has 6 experts"):
        low_rank_routers(model.config, tensors_of(model), rank)


@pytest.mark.parametrize("moe", [None, MoEConfig(mode="custom")])
def test_a_model_without_experts_is_refused(moe: MoEConfig | None) -> None:
    model = tiny_model(config=tiny_config(moe=moe))
    with pytest.raises(UserError, match="no experts"):
        low_rank_routers(model.config, tensors_of(model), 2)


def test_a_missing_router_is_named() -> None:
    model = tiny_model(config=config_of())
    tensors: dict[str, Tensor] = tensors_of(model)
    del tensors[f"{GATE.format(1)}.weight"]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate\.u: the model has no such tensor"):
        low_rank_routers(model.config, tensors, 2)
