"""Train gm-tiny's SentencePiece tokenizer on the generator's own text.

    python examples/train_gm_tiny/tokenizer.py OUT_DIR

The settings follow Gemma's tokenizer (BPE, byte fallback, text left exactly as it is), so that the same code reads
both. Every word that the questions and answers use is one piece with a space before it, and without one where it may
open a message or an answer.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import sentencepiece as spm
from phrasings import AT_POSITION, DIRECTIONS, PHRASINGS, plural, with_article
from scenes import COLOURS, SHAPES

VOCAB_SIZE = 768
MODEL_NAME = "tokenizer.model"
CONTROL_SYMBOLS = ["<start_of_turn>", "<end_of_turn>", "<image>"]
# Words with a place in a message but in no question.
CHAT_WORDS = ("user", "model")

COMMON_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most made
after also did many off before must well back through years where much your way down should because long each just state
people those too good make how work day same look see very know little great think here picture photo find tell show
name please yes thank hello sorry i small big large light dark white pink number left right between near
"""


def word_lists() -> tuple[list[str], list[str]]:
    """The words of questions and answers, and those that may open a message or an answer; both sorted."""
    text = [
        *(phrase for phrasings in PHRASINGS.values() for phrase in phrasings),
        *AT_POSITION,
        *AT_POSITION.values(),
        *(words for _, _, phrases in DIRECTIONS.values() for words in phrases),
        *COLOURS,
        *SHAPES,
        *map(plural, (*SHAPES, "shape", "object")),
        *map(with_article, (*COLOURS, *SHAPES)),
        *CHAT_WORDS,
        "yes no nothing",
    ]
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", " ".join(text))))
    openers = {phrase.split()[0] for phrasings in PHRASINGS.values() for phrase in phrasings}
    openers |= {word.capitalize() for word in openers}
    answers = {*COLOURS, *SHAPES, *" ".join(AT_POSITION).split(), "a", "an", "yes", "no", "nothing"}
    return sorted(words), sorted(openers | answers | {*CHAT_WORDS})


def corpus() -> list[str]:
    """Training lines: each word as often as makes it one piece before the less needed ones."""
    words, openers = word_lists()
    lines = [f" {word}" for word in words] * 400 + openers * 300
    lines += [f" {word}" for word in COMMON_WORDS.split()] * 20
    return lines


def train(vocab_size: int = VOCAB_SIZE) -> bytes:
    """Train the model; the same source always gives the same bytes.

    Returns:
        The serialised SentencePiece model: pad 0, eos 1, bos 2, unk 3, then control symbols, newline, bytes, pieces.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=CONTROL_SYMBOLS,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789?!.,:;'\"-()",
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(out_dir: str) -> None:
    """Write ``OUT_DIR/tokenizer.model``."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_NAME
    path.write_bytes(train())
    print(f"{path}: {spm.SentencePieceProcessor(model_file=str(path)).vocab_size()} pieces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: tokenizer.py OUT_DIR")
    main(sys.argv[1])
