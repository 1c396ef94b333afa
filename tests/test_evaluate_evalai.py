"""Answers as VQA's servers compare them."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gm_mlx.evaluate.evalai import CONTRACTIONS, MOST_PERIODS, normalised

# By hand, from the description of the steps.
CASES = {
    "Red": "red",
    "  Two  Dogs.\n": "2 dogs",
    "none": "0",
    "eleven": "eleven",
    "a man and an apple on the table": "man and apple on table",
    "THE": "",
    "1,000": "1000",
    "yes, it is": "yes it is",
    "what?": "what",
    "3.5": "3.5",
    "3.": "3",
    "u.s.a.": "usa",
    "v1.2.": "v1.2",
    "black/white": "black white",
    "black / white": "black white",  # the mark goes, and both spaces become one
    "on-off": "on off",
    "on-off -": "onoff",  # a mark at an edge anywhere: all of this mark go without a space
    "(left)": "left",
    "x (left)": "x left",
    "john's": "john 's",
    "dont": "don't",
    "don't": "don't",
    "cant stop": "can't stop",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "oclock": "o'clock",
    "whats": "what's",
    "its": "its",
    "well": "well",
    "7:30": "7:30",
    "a\tb": "b",
    "50%": "50%",
    "the-one": "1",
    "Unanswerable": "unanswerable",
    "": "",
}


@pytest.mark.parametrize(("answer", "wanted"), CASES.items())
def test_cases(answer: str, wanted: str) -> None:
    assert normalised(answer) == wanted


def test_periods_that_are_left() -> None:
    """The original passes a flag where the number of replacements is due."""
    assert MOST_PERIODS == 32
    assert normalised("x" + "." * 40) == "x" + "." * 8


def test_contractions_have_one_apostrophe_more() -> None:
    assert CONTRACTIONS["aint"] == "ain't" and CONTRACTIONS["youre"] == "you're" and CONTRACTIONS["twas"] == "'twas"
    for wrong, right in CONTRACTIONS.items():
        assert right.count("'") == wrong.count("'") + 1
        assert right.replace("'", "") == wrong.replace("'", "")
        assert wrong not in CONTRACTIONS.values() or "'" in wrong


WORDS = st.sampled_from(
    ["a", "The", "one", "TEN", "dont", "x-y", "-", "(", ".", "3.4", "e.g.", "it,", "why?", "  ", "\n"]
)
ANSWERS = st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=8).map(" ".join))


@given(ANSWERS)
def test_once_is_enough_without_apostrophes(answer: str) -> None:
    """What has an apostrophe may change again: "whats" becomes "what's" and that "what 's"."""
    once = normalised(answer)
    assume("'" not in answer and "'s" not in once and answer.count(".") <= MOST_PERIODS)
    assert normalised(once) == once


@given(ANSWERS)
def test_what_is_gone(answer: str) -> None:
    assume(answer.count(".") <= MOST_PERIODS)
    once = normalised(answer)
    assert not set(once) & set(';/[]"{}()=+\\_-><@`!,?\n\t')
    assert not {"a", "an", "the", "none", "three", ""} & set(once.split(" ")) or once == ""
    assert not once.endswith(".")


@given(st.lists(st.sampled_from(["cat", "two", "dogs", "red", "x1"]), min_size=1, max_size=6), st.data())
def test_plain_words_keep_their_order(words: list[str], data: st.DataObject) -> None:
    """Articles, case, commas and a full stop make no difference."""
    plain = " ".join("2" if word == "two" else word for word in words)
    dressed = [f"{data.draw(st.sampled_from(['', 'the ', 'A ']))}{word.upper()}" for word in words]
    assert normalised(", ".join(dressed) + ".") == plain
