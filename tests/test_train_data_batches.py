"""Which rows a step learns from: all rows once per epoch, shares that join to the step's batch, little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlx.errors import UserError
from gm_mlx.train.batches import Plan, padding

LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=300).map(np.array)


@settings(max_examples=150)
@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 9), shares=st.integers(1, 6))
def test_an_epoch_takes_each_row_once(lengths: np.ndarray, size: int, seed: int, shares: int) -> None:
    plan = Plan(lengths, size, seed)
    steps = plan.steps_per_epoch
    assert steps == -(-len(lengths) // size)
    for epoch in (0, 3):
        batches = [plan.rows(epoch * steps + step) for step in range(steps)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        sizes = {len(rows) for rows in batches}
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
        for step, rows in enumerate(batches):
            assert (np.diff(lengths[rows]) >= 0).all()
            parts = [plan.share(epoch * steps + step, number, shares).tolist() for number in range(shares)]
            assert [row for part in parts for row in part] == rows.tolist()  # disjoint, and nothing is missing


@settings(max_examples=60)
@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 9), steps=st.permutations(range(25)))
def test_a_step_depends_on_nothing_but_its_number(lengths: np.ndarray, size: int, seed: int, steps: list[int]) -> None:
    first = Plan(lengths, size, seed)
    in_order = [first.rows(step).tolist() for step in range(25)]
    other = Plan(lengths.copy(), size, seed)
    assert {step: other.rows(step).tolist() for step in steps} == dict(enumerate(in_order))


def test_epochs_and_seeds_differ() -> None:
    lengths = np.arange(200)
    plan = Plan(lengths, 8, 0)
    epochs = [[plan.rows(epoch * 25 + step).tolist() for step in range(25)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert [Plan(lengths, 8, 1).rows(step).tolist() for step in range(25)] != epochs[0]
    # Not only the order of batches: who shares one with whom.
    assert {frozenset(rows) for rows in epochs[0]} != {frozenset(rows) for rows in epochs[1]}


def test_the_order_is_the_one_that_runs_were_started_with() -> None:
    """A run must be able to go on after an update."""
    plan = Plan(np.array([5, 9, 2, 7, 7, 1, 3, 8]), 3, 42)
    assert [plan.rows(step).tolist() for step in range(6)] == [
        [4, 3, 1],
        [5, 2],
        [6, 0, 7],
        [6, 0, 3],
        [5, 2, 1],
        [4, 7],
    ]


def test_the_batch_that_needs_most_memory_comes_first() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(10, 500, 1000)
    lengths[123] = 2000
    assert 123 in Plan(lengths, 8, 5).rows(0)


def test_rows_of_like_length_share_a_batch() -> None:
    random = np.random.default_rng(0)
    lengths = np.concatenate([576 + random.integers(20, 400, 4000), random.integers(20, 1500, 1000)])
    plan = Plan(lengths, 16)
    shuffled = random.permutation(len(lengths))
    batches = np.array_split(lengths[shuffled], plan.steps_per_epoch)
    plain = 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)
    assert plain > 0.3
    assert padding(plan, lengths) < 0.04
    assert padding(plan, lengths, shares=4) < padding(plan, lengths) < padding(plan, lengths, multiple=64)


def test_padding_is_that_of_the_batches() -> None:
    plan = Plan(np.array([4, 6]), 2)
    assert padding(plan, np.array([4, 6])) == pytest.approx(1 - 10 / 12)
    assert padding(plan, np.array([4, 6]), shares=2) == 0
    assert padding(plan, np.array([4, 6]), shares=5, multiple=8) == pytest.approx(1 - 10 / 16)


def test_impossible_plans() -> None:
    with pytest.raises(UserError, match="no rows"):
        Plan(np.array([], int), 4)
    with pytest.raises(UserError, match="batch size 0"):
        Plan(np.array([1]), 0)
