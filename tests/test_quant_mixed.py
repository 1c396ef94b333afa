"""Mixed precision: damages are measured right, and the choice of bits is the best one that fits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from fixtures import tiny_config, tiny_folder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlx.cli.console import parse_size
from gm_mlx.config import MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.quant.calibration import load_samples
from gm_mlx.quant.mixed import choose_mixed, solve
from gm_mlx.quant.quantize import Source, measure, open_source, prepare, write
from gm_mlx.quant.sensitivity import OPTIONS, Damage, kl_damage, layer_damage, parts
from gm_mlx.quant.sizes import component_sizes, file_bytes, total

BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(tiny_folder(tmp_path_factory.mktemp("mixed") / "source"))


@pytest.fixture(scope="module")
def damage(source: Source) -> Damage:
    return kl_damage(source.config, source.tensors, source.processor, load_samples(None, 3))


@pytest.fixture(scope="module")
def by_layer(source: Source) -> Damage:
    return layer_damage(source.config, source.tensors, source.processor, load_samples(None, 3))


def test_parts() -> None:
    found = parts(tiny_config(moe=MoEConfig(use_residual=True)))
    assert sorted(found) == sorted(
        [
            "embeddings",
            "head",
            "layers.0.attention",
            "layers.0.experts",
            "layers.0.dense_ffn",
            "layers.1.attention",
            "layers.1.dense_ffn",
        ]
    )
    assert all(path.startswith("language_model.model.layers.0.mlp.mlp.") for path in found["layers.0.dense_ffn"])
    assert "head" not in parts(tiny_config(tie_word_embeddings=True))


@pytest.mark.parametrize("measure_name", ["damage", "by_layer"])
def test_fewer_bits_do_more_damage(measure_name: str, source: Source, request: pytest.FixtureRequest) -> None:
    measured: Damage = request.getfixturevalue(measure_name)
    assert list(measured) == list(parts(source.config))
    for part, by_bits in measured.items():
        assert list(by_bits) == [option.bits for option in OPTIONS]
        assert by_bits[2] > by_bits[4] > by_bits[8] > 0, part


def test_the_two_measures_agree_on_what_is_worse(damage: Damage, by_layer: Damage) -> None:
    keys = [(part, bits) for part in damage for bits in damage[part]]
    ranks = [np.argsort(np.argsort([measured[part][bits] for part, bits in keys])) for measured in (damage, by_layer)]
    assert np.corrcoef(ranks)[0, 1] > 0.8


def test_measuring_leaves_the_model_as_it_was(source: Source, damage: Damage) -> None:
    again = kl_damage(source.config, source.tensors, source.processor, load_samples(None, 3))
    assert again == damage


def test_a_tied_head_counts_with_the_embeddings(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tied = open_source(tiny_folder(tmp_path / "source", model=tiny_model(config=config)))
    samples = load_samples(None, 1)
    measured = layer_damage(tied.config, tied.tensors, tied.processor, samples)
    assert set(measured) == set(parts(config))
    assert measured["embeddings"][2] > measured["embeddings"][8] > 0


tables = st.lists(
    st.tuples(
        st.lists(st.integers(1, 1000), min_size=3, max_size=3, unique=True).map(sorted),
        st.lists(st.floats(0, 10), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(tables, st.integers(0, 3000))
def test_the_choice_is_the_best_that_fits(table: list, extra: int) -> None:
    sizes = {str(i): dict(zip(BITS, row, strict=True)) for i, (row, _) in enumerate(table)}
    damage = {str(i): dict(zip(BITS, row, strict=True)) for i, (_, row) in enumerate(table)}
    chosen = solve(sizes, damage, extra)
    smallest = sum(by_bits[2] for by_bits in sizes.values())

    def size(bits: dict[str, int]) -> int:
        return sum(sizes[part][b] for part, b in bits.items()) - smallest

    def harm(bits: dict[str, int]) -> float:
        # More bits never help less: what a noisy measurement says against it is not believed.
        return sum(max(d for other, d in damage[part].items() if other >= b) for part, b in bits.items())

    everything = [dict(zip(sizes, choice, strict=True)) for choice in itertools.product(BITS, repeat=len(sizes))]
    best = min(harm(bits) for bits in everything if size(bits) <= extra)
    assert size(chosen) <= extra
    assert harm(chosen) == pytest.approx(best)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 60))
def test_large_models_fit_their_budget_and_more_bytes_never_harm(seed: int, num_parts: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.integers(10**5, 10**9, num_parts)
    sizes = {str(i): {bits: int(n) * bits // 8 for bits in BITS} for i, n in enumerate(weights)}
    damage = {
        str(i): {b: float(x) for b, x in zip(BITS, random.exponential(size=3), strict=True)} for i in range(num_parts)
    }
    spread = sum(by_bits[8] - by_bits[2] for by_bits in sizes.values())
    last = np.inf
    for extra in np.sort(random.integers(0, spread + 10, 4)):
        chosen = solve(sizes, damage, int(extra))
        used = sum(sizes[part][bits] - sizes[part][2] for part, bits in chosen.items())
        harm = sum(max(d for other, d in damage[part].items() if other >= b) for part, b in chosen.items())
        assert used <= extra
        assert harm <= last * (1 + 1e-12)
        last = harm


def test_a_budget_is_kept_by_the_file_and_spent_well(source: Source, tmp_path: Path) -> None:
    samples = load_samples(None, 2)
    # What the plain recipe with 4 bits takes, for the parts that mixed may choose.
    budget = file_bytes(source.config, prepare(source, "q4").plan.table)
    result = prepare(source, "mixed", samples, target_bytes=budget)
    assert result.steps["mixed"]["measure"] == "kl"
    write(source, result, tmp_path / "out", "", {})
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= budget
    # What is left is the reserve for the header, and less than a step of the part that would be the next.
    assert total(result.sizes).bytes > 0.85 * budget
    plain = prepare(source, "q4")
    measure(source, [result, plain], samples)
    assert result.agreement is not None
    assert plain.agreement is not None
    assert result.agreement.kl < plain.agreement.kl


def test_larger_budgets_expect_less_damage(source: Source) -> None:
    samples = load_samples(None, 2)
    low = total(component_sizes(source.config, prepare(source, "q4-all").plan.table)).bytes
    plans = [
        choose_mixed(source.config, source.tensors, source.processor, samples, int(low * factor), measure="layer")
        for factor in (1.2, 1.5, 3)
    ]
    expected = [found.expected for found in plans]
    assert expected == sorted(expected, reverse=True)
    assert expected[0] > expected[2]
    assert set(plans[2].bits.values()) == {8}


def test_a_budget_that_is_too_small(source: Source) -> None:
    with pytest.raises(
        UserError, match=r"--target-size: 1000 bytes are too few: .* ask for at least 0\.\d\dMB"
    ) as caught:
        prepare(source, "mixed", load_samples(None, 1), target_bytes=1000)
    smallest = parse_size(str(caught.value).split()[-1], "the message")
    result = prepare(source, "mixed", load_samples(None, 1), target_bytes=smallest, measure="layer")
    assert list(result.steps["mixed"]["bits"].values()).count(2) >= 5
