"""Tokenized rows, kept as a few long arrays.

A slot of an image is one id here and becomes ``tokens_per_image`` ids when a row is asked for: for LLaVA that is most
of the memory. Texts are cut between turns only, and from the end: an answer is learnt to its end marker or not at all,
and an image slot is never cut.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gm_mlx.chat_template import ChatTemplate
from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.train.rows import ImageRef, Problem, Row, image_key


@dataclass(frozen=True, eq=False)
class Dataset:
    """N tokenized rows.

    Attributes:
        rows: the rows that the tokens come from.
        ids: int32 [T], the rows' token ids one after another, one id per image slot.
        learnt: bool [T], True where a token is to be learnt.
        starts: int64 [N + 1], where each row begins.
        images: all images, each once.
        slots: int32 [S], the rows' image slots one after another, as indices of ``images``.
        slot_starts: int64 [N + 1].
        dropped: int32 [N], turns (a question with its answer) that were left out at the end of each row.
        image_token_id: the id of a slot.
        tokens_per_image: how many ids a slot stands for.
    """

    rows: Sequence[Row]
    ids: np.ndarray
    learnt: np.ndarray
    starts: np.ndarray
    images: Sequence[ImageRef]
    slots: np.ndarray
    slot_starts: np.ndarray
    dropped: np.ndarray
    image_token_id: int
    tokens_per_image: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each row, with all positions of its images."""
        return np.diff(self.starts) + np.diff(self.slot_starts) * (self.tokens_per_image - 1)

    @property
    def answer_lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each row that are learnt."""
        return np.diff(np.concatenate([[0], np.cumsum(self.learnt, dtype=np.int64)])[self.starts])

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's ids, int32 [L], and which of them are learnt, bool [L]; its image slots at their full length."""
        part = slice(self.starts[row], self.starts[row + 1])
        ids = self.ids[part]
        times = np.where(ids == self.image_token_id, self.tokens_per_image, 1)
        return np.repeat(ids, times), np.repeat(self.learnt[part], times)

    def images_of(self, row: int) -> list[int]:
        """Indices in ``images`` of a row's images, in the order of their slots."""
        return self.slots[self.slot_starts[row] : self.slot_starts[row + 1]].tolist()

    def take(self, indices: Sequence[int]) -> Dataset:
        """The data set of some of its rows."""
        chosen = np.asarray(indices, dtype=np.int64)
        ids, starts = _spans(self.starts, chosen)
        slots, slot_starts = _spans(self.slot_starts, chosen)
        used, renumbered = np.unique(self.slots[slots], return_inverse=True)
        return replace(
            self,
            rows=[self.rows[row] for row in indices],
            ids=self.ids[ids],
            learnt=self.learnt[ids],
            starts=starts,
            images=[self.images[image] for image in used],
            slots=renumbered.astype(np.int32),
            slot_starts=slot_starts,
            dropped=self.dropped[chosen],
        )

    def fingerprint(self) -> str:
        """A hash of all tokens, masks and image names: a run may go on with the same data only."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.ids, self.learnt, self.starts, self.slots, self.slot_starts):
            digest.update(part.tobytes())
        digest.update("\0".join(map(image_key, self.images)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _spans(starts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the chosen spans' elements, one after another, and where each of these spans begins."""
    sizes = np.diff(starts)[chosen]
    ends = np.cumsum(sizes)
    new_starts = np.concatenate([[0], ends]).astype(np.int64)
    return np.arange(new_starts[-1]) + np.repeat(starts[chosen] - new_starts[:-1], sizes), new_starts


def tokenized(rows: Iterable[Row], processor: Processor, max_length: int) -> tuple[Dataset, list[Problem]]:
    """Tokenize rows.

    With a template that marks no turns (``plain``, the papers' stage 1) only images and answers are read: LLaVA leaves
    the question out there.

    Args:
        rows: the rows.
        processor: the model's processor.
        max_length: tokens that a row may have, all positions of its images among them. Of a longer row, turns are left
            out from the end.

    Returns:
        The rows that can be learnt from, and why the others cannot.

    Raises:
        UserError: a row has an image and the model reads text only.
    """
    kept: list[Row] = []
    ids, learnt, starts = array("i"), array("b"), array("q", [0])
    slots, slot_starts, dropped = array("i"), array("q", [0]), array("i")
    images: dict[str, int] = {}
    refs: list[ImageRef] = []
    problems: list[Problem] = []
    for row in rows:
        if row.images and processor.image is None:
            raise UserError(f"{row.where}: has an image, but this model reads text only; choose another")
        try:
            row_ids, row_learnt, left_out = _fitted(row, processor, max_length)
        except UserError as error:
            problems.append(Problem(row.where, str(error)))
            continue
        single = _one_per_slot(row_ids, processor)
        ids.frombytes(row_ids[single].tobytes())
        learnt.frombytes(row_learnt[single].tobytes())
        for image in row.images[: int((row_ids[single] == processor.image_token_id).sum())]:
            key = image_key(image)
            if key not in images:
                images[key] = len(refs)
                refs.append(image)
            slots.append(images[key])
        kept.append(row)
        starts.append(len(ids))
        slot_starts.append(len(slots))
        dropped.append(left_out)
    dataset = Dataset(
        rows=kept,
        ids=np.frombuffer(ids, np.int32),
        learnt=np.frombuffer(learnt, np.bool_),
        starts=np.frombuffer(starts, np.int64),
        images=refs,
        slots=np.frombuffer(slots, np.int32),
        slot_starts=np.frombuffer(slot_starts, np.int64),
        dropped=np.frombuffer(dropped, np.int32),
        image_token_id=processor.image_token_id,
        tokens_per_image=processor.tokens_per_image,
    )
    return dataset, problems


def _fitted(row: Row, processor: Processor, max_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A row's ids, int32 [L], mask, bool [L], and how many turns were left out to make it fit."""
    messages = _without_questions(row) if _marks_no_turns(processor.template) else row.messages
    shortest = len(messages) - 2 * (len(row.turns) // 2 - 1)
    for end in range(len(messages), shortest - 1, -2):
        num_images = sum(part["type"] == "image" for message in messages[:end] for part in _parts(message))
        ids, learnt = processor.encode_supervised(messages[:end], num_images)
        if len(ids) <= max_length:
            break
    else:
        images = f", {num_images * processor.tokens_per_image} of them for images" if num_images else ""
        raise UserError(
            f"its first question and answer have {len(ids)} tokens{images}, and {max_length} fit; shorten them"
        )
    if not any(learnt):
        raise UserError("none of its tokens would be learnt; give an answer")
    return np.array(ids, np.int32), np.array(learnt, np.bool_), (len(messages) - end) // 2


def _marks_no_turns(template: ChatTemplate) -> bool:
    return not (template.user_start or template.user_end or template.assistant_start)


def _without_questions(row: Row) -> list[dict[str, Any]]:
    """LLaVA's ``preprocess_plain``: the images and one answer."""
    question, answer = row.messages[-2:]
    if len(row.turns) != 2:
        raise UserError("several turns, where a template without turns (stage 1) has one answer; take the others out")
    if not row.images:
        raise UserError("no image, where a template without turns (stage 1) learns to describe images; take it out")
    return [{**question, "content": [part for part in _parts(question) if part["type"] == "image"]}, answer]


def _parts(message: dict[str, Any]) -> list[dict[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _one_per_slot(ids: np.ndarray, processor: Processor) -> np.ndarray:
    """bool [L]: all positions but those of an image after its first."""
    slots = ids == processor.image_token_id
    # Slots have one length, so also those that touch each other begin at its multiples.
    return ~slots | ((np.cumsum(slots) - 1) % max(1, processor.tokens_per_image) == 0)
