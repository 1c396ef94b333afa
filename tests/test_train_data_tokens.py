"""Tokenized rows: the mask decoded back for every template, what is cut when a row is too long, the hold-out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from training_data import SLOT, TEMPLATES, TOKENS_PER_IMAGE, processor, row

from gm_mlx.chat_template import EOS, PLAIN
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.train.dataset import Dataset, tokenized
from gm_mlx.train.facts import facts
from gm_mlx.train.rows import Row, image_key
from gm_mlx.train.split import split

KINDS = ("gemma", "llama", "phi")
FAR = 10_000  # tokens: nothing is too long

# "▁" is a space to SentencePiece.
WORDS = st.text(alphabet=st.sampled_from(" adog:\n🙂<>{}") | st.characters(exclude_categories=["Cs"]), max_size=12)
TEXT = WORDS.filter(lambda words: "▁" not in words)
ANSWER = TEXT.filter(lambda words: bool(words.strip()))
QUESTION = TEXT | st.lists(st.none() | TEXT, min_size=1, max_size=3)
TALK = st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=4)
SYSTEM = st.none() | TEXT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Processor]:
    found: dict[tuple[str, str], Processor] = {}
    root = tmp_path_factory.mktemp("processors")

    def make(template: str, kind: str = "gemma") -> Processor:
        if (template, kind) not in found:
            found[template, kind] = processor(root / f"{template}-{kind}", TEMPLATES[template], kind)
        return found[template, kind]

    return make


def talk_row(talk: list[tuple[Any, str]], system: str | None = None) -> Row:
    turns = [content for turn in talk for content in turn]
    slots = sum(part is None for content in turns if isinstance(content, list) for part in content)
    return row(*turns, images=[f"{n}.png" for n in range(slots)], system=system)


def only(rows: list[Row], processor: Processor, max_length: int = FAR) -> Dataset:
    dataset, problems = tokenized(rows, processor, max_length)
    assert problems == []
    return dataset


def answers(ids: np.ndarray, learnt: np.ndarray, processor: Processor) -> list[str]:
    """The texts of the stretches that are learnt, each without the marker that ends an answer."""
    template = processor.template
    found = []
    for counts, part in groupby(zip(ids.tolist(), learnt.tolist(), strict=True), key=lambda pair: pair[1]):
        if counts:
            tokens = [token for token, _ in part]
            # The model must write the end, too: one id that ends an answer, or the text of the template's end.
            if template.answer_end in (EOS, *template.controls):
                assert tokens[-1] in processor.stop_ids
            text = processor.tokenizer.decode(tokens, continues=True)
            end = "" if template.answer_end in (EOS, *template.controls) else template.answer_end
            assert text.startswith(template.answer_start) and text.endswith(end)
            found.append(text[len(template.answer_start) : len(text) - len(end)])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
@settings(max_examples=40)
@given(talk=TALK, system=SYSTEM)
def test_what_is_learnt_are_the_answers(
    made: Callable[[str, str], Processor], template: str, kind: str, talk: list[tuple[Any, str]], system: str | None
) -> None:
    reader, mine = made(template, kind), talk_row(talk, system)
    dataset = only([mine], reader)
    ids, learnt = dataset.tokens(0)
    assert answers(ids, learnt, reader) == [answer for _, answer in talk]
    assert not learnt[ids == SLOT].any()
    # The long way, without arrays: the processor's own ids and mask.
    plain_ids, plain_learnt = reader.encode_supervised(mine.messages, len(mine.images))
    assert ids.tolist() == plain_ids and learnt.tolist() == plain_learnt
    assert dataset.lengths.tolist() == [len(plain_ids)] and dataset.answer_lengths.tolist() == [sum(plain_learnt)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(answer=ANSWER, question=TEXT, count=st.integers(1, 3))
def test_stage_one_learns_a_caption_after_its_images(
    made: Callable[[str, str], Processor], kind: str, answer: str, question: str, count: int
) -> None:
    """LLaVA's preprocess_plain leaves the question out."""
    reader = made("plain", kind)
    dataset = only([talk_row([([None, question, *[None] * (count - 1)], answer)])], reader)
    ids, learnt = dataset.tokens(0)
    assert ids.tolist()[: 1 + count * TOKENS_PER_IMAGE] == [reader.tokenizer.bos_id, *[SLOT] * count * TOKENS_PER_IMAGE]
    assert learnt.tolist() == [False] * (1 + count * TOKENS_PER_IMAGE) + [True] * int(learnt.sum())
    # The answer follows no text, so a tokenizer with a leading space of its own puts one there.
    assert reader.tokenizer.decode(ids[learnt]) == answer + PLAIN.answer_end


def test_stage_one_needs_an_image_and_one_answer(made: Callable[..., Processor]) -> None:
    rows = [row("Q", "A"), row([None], "A", "Q", "A", images=["x.png"])]
    dataset, problems = tokenized(rows, made("plain"), FAR)
    assert len(dataset) == 0
    assert "no image" in problems[0].reason and "several turns" in problems[1].reason


@settings(max_examples=60)
@given(talk=TALK, system=SYSTEM, template=st.sampled_from(["gemma", "v1", "openchat"]), data=st.data())
def test_long_rows_lose_whole_turns_at_their_end(
    made: Callable[..., Processor], talk: list[tuple[Any, str]], system: str | None, template: str, data: st.DataObject
) -> None:
    reader = made(template)
    whole = talk_row(talk, system)
    shorter = [talk_row(talk[:count], system) for count in range(1, len(talk) + 1)]
    sizes = [len(reader.encode_supervised(part.messages, len(part.images))[0]) for part in shorter]
    limit = data.draw(st.integers(max(1, sizes[0] - 2), sizes[-1] + 1), label="limit")
    dataset, problems = tokenized([whole], reader, limit)
    fitting = [count for count, size in enumerate(sizes, 1) if size <= limit]
    if not fitting:
        assert len(dataset) == 0 and f"have {sizes[0]} tokens" in problems[0].reason
        return
    kept = shorter[fitting[-1] - 1]
    ids, learnt = dataset.tokens(0)
    expected, mask = reader.encode_supervised(kept.messages, len(kept.images))
    assert (ids.tolist(), learnt.tolist()) == (expected, mask)
    assert [dataset.images[image] for image in dataset.images_of(0)] == list(kept.images)
    assert dataset.dropped.tolist() == [len(talk) - fitting[-1]]
    runs = [len(list(run)) for is_slot, run in groupby((ids == SLOT).tolist()) if is_slot]
    assert all(run % TOKENS_PER_IMAGE == 0 for run in runs)


def test_a_row_that_cannot_fit_says_what_takes_the_room(made: Callable[..., Processor]) -> None:
    _, (problem,) = tokenized([row([None, None], "A", images=["1.png", "2.png"], number=7)], made("gemma"), 8)
    assert str(problem).startswith("data.jsonl: line 7: its first question and answer have ")
    assert "8 of them for images, and 8 fit" in str(problem)


def test_a_row_with_nothing_to_learn_is_a_problem(made: Callable[..., Processor]) -> None:
    class Forgetful:
        """A processor whose mask is empty."""

        def __init__(self, inner: Processor) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def encode_supervised(self, messages: Any, num_images: int) -> Any:
            ids, mask = self.inner.encode_supervised(messages, num_images)
            return ids, [False] * len(mask)

    dataset, (problem,) = tokenized([row("Q", "A")], Forgetful(made("gemma")), FAR)  # type: ignore[arg-type]
    assert len(dataset) == 0 and "none of its tokens would be learnt" in problem.reason


def test_a_text_model_says_so_once(made: Callable[..., Processor], tmp_path: Any) -> None:
    reader = processor(tmp_path, image=None, tokens_per_image=0)
    assert only([row("Q", "A")], reader).lengths[0] == len(reader.encode_supervised(row("Q", "A").messages)[0])
    with pytest.raises(UserError, match="line 1: has an image, but this model reads text only"):
        tokenized([row([None], "A", images=["x.png"])], reader, FAR)


@settings(max_examples=60)
@given(
    picks=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    data=st.data(),
)
def test_some_rows_of_a_data_set(made: Callable[..., Processor], picks: list[list[int]], data: st.DataObject) -> None:
    rows = [row([*[None] * len(pick), f"Q{n}"], "A" * n or "B", images=[f"{p}.png" for p in pick])
            for n, pick in enumerate(picks)]  # fmt: skip
    whole = only(rows, made("gemma"))
    assert len(whole.images) == len({image for pick in picks for image in pick})
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6), label="chosen")
    some = whole.take(chosen)
    assert len(some) == len(chosen)
    for new, old in enumerate(chosen):
        assert some.rows[new] is rows[old]
        for mine, other in zip(some.tokens(new), whole.tokens(old), strict=True):
            np.testing.assert_array_equal(mine, other)
        assert [some.images[image] for image in some.images_of(new)] == list(rows[old].images)
    assert {image_key(image) for image in some.images} == {f"{p}.png" for old in chosen for p in picks[old]}
    assert some.fingerprint() == whole.take(chosen).fingerprint()
    if chosen != list(range(len(rows))):
        assert some.fingerprint() != whole.fingerprint()


def test_a_fingerprint_sees_texts_and_images(made: Callable[..., Processor]) -> None:
    variants = [("Q", "A", "1.png"), ("R", "A", "1.png"), ("Q", "B", "1.png"), ("Q", "A", "2.png")]
    prints = [only([row([None, q], a, images=[i])], made("gemma")).fingerprint() for q, a, i in variants]
    assert len(set(prints)) == 4


def test_facts(made: Callable[..., Processor]) -> None:
    reader = made("gemma")
    short = row([None, "Q"], "A", images=["1.png"])
    long = row([None, "Q"], "A", "R" * 50, "B", images=["./1.png"])
    text = row("Q", "A dog.")
    limit = len(reader.encode_supervised(short.messages, 1)[0])
    dataset = only([short, short, long, text], reader, limit)
    table = facts(dataset, 0.25)
    sizes = sorted([limit, limit, limit, len(reader.encode_supervised(text.messages)[0])])
    assert table == {
        "rows": 4,
        "rows_with_images": 3,
        "duplicates": 1,
        "images": 1,
        "turns_dropped": 1,
        "rows_shortened": 1,
        "tokens": {"min": sizes[0], "median": limit, "max": sizes[-1], "total": sum(sizes)},
        "image_tokens": {"min": 0, "median": 4, "max": 4, "total": 12},
        "answer_tokens": table["answer_tokens"],
        "padding": 0.25,
    }
    assert table["answer_tokens"]["total"] == sum(dataset.tokens(n)[1].sum() for n in range(4))
    assert facts(dataset.take([]))["tokens"] == {"min": 0, "median": 0, "max": 0, "total": 0}


# --- the hold-out ---


@settings(max_examples=150)
@given(
    picks=st.lists(st.lists(st.integers(0, 12), max_size=2), min_size=2, max_size=25),
    share=st.floats(0, 0.6),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_no_image_is_on_both_sides(picks: list[list[int]], share: float, seed: int, data: st.DataObject) -> None:
    rows = [row([*[None] * len(pick), f"Q{n % 3}"], "A", images=[f"{p}.png" for p in pick], number=n)
            for n, pick in enumerate(picks)]  # fmt: skip
    count = round(share * len(rows))
    assume(count < len(rows))
    try:
        learnt, held = split(rows, share, seed)
    except UserError as error:
        assert "smallest group" in str(error)
        return
    assert sorted(learnt + held) == list(range(len(rows))) and len(held) <= count
    sides = [{image for index in side for image in rows[index].images} for side in (learnt, held)]
    assert not sides[0] & sides[1]
    texts = [{rows[index].texts for index in side if not rows[index].images} for side in (learnt, held)]
    assert not texts[0] & texts[1]
    # The same rows in another order: the same hold-out.
    order = data.draw(st.permutations(range(len(rows))), label="order")
    _, again = split([rows[index] for index in order], share, seed)
    assert sorted(order[index] for index in again) == held


def test_hold_outs_of_a_size_and_of_other_seeds() -> None:
    rows = [row([None, "Q"], "A", images=[f"{n}.png"]) for n in range(100)]
    assert [len(split(rows, count)[1]) for count in (0, 7, 0.25)] == [0, 7, 25]
    assert split(rows, 10, seed=1)[1] != split(rows, 10, seed=2)[1]


def test_hold_outs_that_cannot_be() -> None:
    rows = [row([None, "Q"], "A", images=["same.png"]) for _ in range(4)]
    with pytest.raises(UserError, match="the smallest group of rows that share images has 4"):
        split(rows, 0.5)
    for wrong in (4, -1, 1.0, 1.5, -0.1):
        with pytest.raises(UserError, match="cannot be held out"):
            split(rows, wrong)
