"""Prefill and decode: one prompt, many ways to feed it, the same logits; and how tokens are chosen."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import IMAGE_TOKEN, VOCAB, tiny_config, tiny_model

from gm_mlx.engine import GREEDY, Sampling
from gm_mlx.errors import UserError
from gm_mlx.generate import Sampler, decode, make_cache, prefill, trim_cache
from gm_mlx.model import Model

LENGTH = 150
# Largest difference of a logit, as a share of the largest logit. Float32 differs by its rounding only; quantized
# keys and values by their steps, 1/255 and 1/15 of a group's range.
TOLERANCES: dict[int | None, float] = {None: 2e-5, 8: 0.03, 4: 0.3}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    ids = np.random.default_rng(0).integers(5, 400, (1, LENGTH))
    ids[0, 3:7] = ids[0, 40:44] = IMAGE_TOKEN  # the second image lies across chunks of 7 and of 42
    return ids


@pytest.fixture(scope="module")
def embeddings(model: Model, ids: np.ndarray) -> mx.array:
    pixels = mx.array(np.random.default_rng(1).normal(size=(2, 16, 16, 3)), dtype=mx.float32)
    return model.embed(ids, model.encode_images(pixels))


@pytest.fixture(scope="module")
def expected(model: Model, embeddings: mx.array) -> mx.array:
    """Logits of the last position, computed in one go and without a cache."""
    return model.logits(model.hidden(embeddings))[:, -1]


def difference(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def greedy(model: Model, embeddings: mx.array, count: int, **options: Any) -> list[int]:
    cache = make_cache(model, **options)
    return list(decode(model, prefill(model, embeddings, cache), cache, Sampling(max_tokens=count)))


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("chunk", [1, 7, 42, LENGTH, 512])
def test_chunks_give_the_logits_of_one_go(
    model: Model, embeddings: mx.array, expected: mx.array, chunk: int, kv_bits: int | None
) -> None:
    cache = make_cache(model, kv_bits=kv_bits)
    logits = prefill(model, embeddings, cache, chunk)
    assert logits.shape == (1, VOCAB)
    assert difference(logits, expected) < TOLERANCES[kv_bits]
    assert [layer.offset for layer in cache] == [LENGTH] * len(model.layers)


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("kept", [1, 64, LENGTH - 1])
def test_a_cached_prefix_gives_the_logits_of_one_go(
    model: Model, embeddings: mx.array, expected: mx.array, kept: int, kv_bits: int | None
) -> None:
    cache = make_cache(model, kv_bits=kv_bits)
    prefill(model, mx.concatenate([embeddings[:, :kept], embeddings[:, :90] * 2], axis=1), cache, 64)
    assert trim_cache(cache, kept)
    assert difference(prefill(model, embeddings[:, kept:], cache, 64), expected) < TOLERANCES[kv_bits]


def test_quantized_caches_are_quantized(model: Model, embeddings: mx.array, expected: mx.array) -> None:
    errors = {
        bits: difference(prefill(model, embeddings, make_cache(model, kv_bits=bits)), expected) for bits in (8, 4)
    }
    assert 0 < errors[8] < errors[4] / 4


def test_a_rotating_cache_is_exact_until_it_is_full(model: Model, embeddings: mx.array, expected: mx.array) -> None:
    for chunk in (1, 64):
        cache = make_cache(model, max_kv_size=LENGTH + 1)
        assert difference(prefill(model, embeddings, cache, chunk), expected) < TOLERANCES[None]
    assert greedy(model, embeddings, 1, max_kv_size=LENGTH + 1) == greedy(model, embeddings, 1)


def test_a_full_rotating_cache_keeps_the_first_and_the_latest_positions(model: Model, embeddings: mx.array) -> None:
    """One layer, fed one by one, sees 4 + 16 positions; attention over these alone, at their places, says the same."""
    config = tiny_config(num_hidden_layers=1)
    model = tiny_model(config=config)
    cache = make_cache(model, max_kv_size=20)
    for position in range(LENGTH):
        logits = prefill(model, embeddings[:, position : position + 1], cache)

    full = make_cache(model)
    prefill(model, embeddings[:, :-1], full)
    keys, values, _ = full[0].state
    seen = [*range(4), *range(LENGTH - 16, LENGTH - 1)]
    chosen = make_cache(model)
    chosen[0].keys, chosen[0].values = keys[:, :, seen], values[:, :, seen]
    chosen[0].offset = len(seen)

    class AtItsPlace:
        """A cache that holds the chosen positions and tells the true number of them to the rotary embedding."""

        offset = LENGTH - 1
        update_and_fetch = chosen[0].update_and_fetch

    expected = model.logits(model.hidden(embeddings[:, -1:], [AtItsPlace()]))[:, 0]
    assert difference(logits, expected) < TOLERANCES[None]
    assert not trim_cache(cache, LENGTH - 1)
    assert trim_cache(cache, LENGTH)


def test_trimming_makes_layers_equal_after_an_interruption(model: Model, embeddings: mx.array) -> None:
    cache = make_cache(model)
    prefill(model, embeddings, cache)
    cache[1].trim(3)
    assert trim_cache(cache, LENGTH - 5)
    assert {layer.offset for layer in cache} == {LENGTH - 5}
    assert not trim_cache(cache, LENGTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "kv_bits: 3 is not 4 or 8"),
        ({"kv_bits": 8, "max_kv_size": 64}, "kv_bits and max_kv_size"),
        ({"max_kv_size": 4}, "max_kv_size: 4 is not above 4"),
    ],
)
def test_caches_that_do_not_exist(model: Model, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_cache(model, **options)


def test_heads_too_small_for_a_quantized_cache() -> None:
    with pytest.raises(UserError, match="heads of 16 do not divide into groups of 32"):
        make_cache(tiny_model(config=tiny_config(head_dim=16)), kv_bits=8)


def test_progress_is_told_after_each_chunk(model: Model, embeddings: mx.array) -> None:
    told: list[tuple[int, int]] = []
    prefill(model, embeddings, make_cache(model), 64, lambda done, total: told.append((done, total)))
    assert told == [(64, LENGTH), (128, LENGTH), (LENGTH, LENGTH)]


def test_prefill_asks_for_one_row_of_logits(
    model: Model, embeddings: mx.array, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    real = Model.logits

    def note(model: Model, hidden: mx.array) -> mx.array:
        shapes.append(hidden.shape)
        return real(model, hidden)

    monkeypatch.setattr(Model, "logits", note)
    prefill(model, embeddings, make_cache(model), 64)
    assert shapes == [(1, 1, 64)]


def test_greedy_decoding_is_one_by_one_argmax(model: Model, embeddings: mx.array) -> None:
    x, expected = embeddings, []
    for _ in range(12):
        expected.append(int(mx.argmax(model.logits(model.hidden(x))[0, -1])))  # type: ignore[arg-type]
        x = mx.concatenate([x, model.language_model.embed(mx.array([[expected[-1]]]))], axis=1)
    assert greedy(model, embeddings, 12) == expected
    assert len(set(expected)) > 4  # or the comparison would say little


@pytest.mark.parametrize("taken", [1, 3, 10])
def test_yielded_tokens_are_in_the_cache_but_for_the_last_of_all(
    model: Model, embeddings: mx.array, taken: int
) -> None:
    cache = make_cache(model)
    tokens = decode(model, prefill(model, embeddings, cache), cache, Sampling(max_tokens=10))
    assert len(list(islice(tokens, taken))) == taken
    assert cache[0].offset == LENGTH + min(taken, 9)


def sampled(model: Model, embeddings: mx.array, **sampling: Any) -> list[int]:
    cache = make_cache(model)
    sampling = {"max_tokens": 16, "temperature": 1.5, **sampling}
    return list(decode(model, prefill(model, embeddings, cache), cache, Sampling(**sampling)))


def test_a_seed_repeats_an_answer_and_leaves_the_global_state_alone(model: Model, embeddings: mx.array) -> None:
    mx.random.seed(0)
    undisturbed = mx.random.normal((3,)).tolist()
    mx.random.seed(0)
    first = sampled(model, embeddings, seed=7)
    assert mx.random.normal((3,)).tolist() == undisturbed
    assert sampled(model, embeddings, seed=7) == first
    assert sampled(model, embeddings, seed=8) != first
    assert sampled(model, embeddings) != sampled(model, embeddings)


LOGITS = mx.log(mx.array([[0.5, 0.25, 0.15, 0.06, 0.04]]))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 1}, {0}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_p": 0.95, "min_p": 0.2, "top_k": 2}, {0, 1}),
        ({"temperature": 1e-6}, {0}),
    ],
)
def test_filters(sampling: dict[str, Any], possible: set[int]) -> None:
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0, **sampling}))
    rows = mx.repeat(LOGITS, 400, axis=0)
    assert set(sampler(rows).tolist()) == possible  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_temperature(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=3))
    count = 4000
    draws = Counter(sampler(mx.repeat(LOGITS, count, axis=0)).tolist())  # type: ignore[arg-type]
    expected = np.array(mx.softmax(LOGITS / temperature))[0]
    for token, probability in enumerate(expected):
        deviation = (count * probability * (1 - probability)) ** 0.5
        assert abs(draws[token] - count * probability) < 5 * deviation


def test_the_repetition_penalty_looks_back_as_far_as_it_says() -> None:
    logits = mx.array([[2.0, 1.9, 1.8, -1.0]])
    for context, expected in ((8, [2, 0, 0]), (1, [0, 1, 0])):
        sampler = Sampler(Sampling(repetition_penalty=1.5, repetition_context=context), history=[0, 1])
        assert [int(sampler(logits + 0).item()) for _ in range(3)] == expected  # type: ignore[arg-type]


def test_the_repetition_penalty_in_decoding(model: Model, embeddings: mx.array, ids: np.ndarray) -> None:
    """The prompt counts, image positions and ids outside the vocabulary do not."""
    history = [*ids[0].tolist(), -200, 10_000]
    cache = make_cache(model)
    sampling = Sampling(max_tokens=24, repetition_penalty=1e6, repetition_context=500)
    tokens = list(decode(model, prefill(model, embeddings, cache), cache, sampling, history=history))
    plain = greedy(model, embeddings, 24)
    positive = set(range(VOCAB)) - set(history)
    assert set(plain) & set(history)
    assert set(tokens[:8]) <= positive
    assert len(set(tokens[:8])) == 8


def test_padding_and_banned_ids_are_never_chosen(model: Model, embeddings: mx.array) -> None:
    logits = prefill(model, embeddings, make_cache(model))
    order = np.argsort(-np.array(logits[0])).tolist()
    best, second = order[:2]

    def first(**options: Any) -> int:
        cache = make_cache(model)
        prefill(model, embeddings, cache)
        return next(decode(model, logits, cache, GREEDY, **options))

    assert first() == best
    assert first(banned=[best, -200, VOCAB + 5]) == second
    assert first(vocab_size=best) == next(token for token in order if token < best)
    assert first(vocab_size=VOCAB + 100) == best


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_context", 0),
    ],
)
def test_sampling_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name}: {value} is not "):
        Sampling(**{name: value})  # type: ignore[arg-type]
