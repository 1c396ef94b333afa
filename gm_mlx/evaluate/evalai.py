"""Answers as the VQA challenge compares them: without articles, punctuation and differences of spelling.

The steps are those of LLaVA's ``m4c_evaluator.EvalAIAnswerProcessor``, with which VQAv2, VizWiz and TextVQA are scored.
Its oddities are kept, because they decide about points: a mark is a space or nothing depending on where the same mark
stands elsewhere in the answer, and "'s" is taken off a word while "whats" is given one.
"""

from __future__ import annotations

import re

# Commas and question marks have been taken out before.
MARKS = ';/[]"{}()=+\\_-><@`!'
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the original gives the flag re.UNICODE, which is 32, where the number of replacements is due
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = ("a", "an", "the")

# Contractions by their endings, without those that are another word when the apostrophe is missing (its, well, shell).
STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
}
OTHERS = ("ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've")


def _misspelt() -> dict[str, str]:
    """Contractions by what they are with one apostrophe missing."""
    right = [stem + ending for ending, stems in STEMS.items() for stem in stems.split()] + list(OTHERS)
    return {
        word[:place] + word[place + 1 :]: word for word in right for place, letter in enumerate(word) if letter == "'"
    }


CONTRACTIONS = _misspelt()
WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}


def normalised(answer: str) -> str:
    """An answer in the form in which it is compared.

    Source: ``EvalAIAnswerProcessor`` of Pythia and LLaVA, from its description. Its rule for commas between digits has
    nothing left to do, as all commas are gone by then.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in MARKS:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if at_an_edge else " ")
    bare = PERIOD.sub("", bare, count=MOST_PERIODS)
    words = [WORDS.get(word, word) for word in bare.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
