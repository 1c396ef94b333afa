"""Greedy answers to many questions at once, for measuring exact match while and after training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from gm_mlx.generate import make_cache
from gm_mlx.model import Model
from gm_mlx.processor import Processor

Ids = Sequence[int] | np.ndarray


def greedy_answers(
    model: Model,
    processor: Processor,
    questions: Sequence[str],
    pixels: Sequence[np.ndarray],
    *,
    max_tokens: int = 32,
    batch_size: int = 64,
) -> list[str]:
    """The model's first answer to each question about its image; see ``answers_after``.

    Args:
        model: the model.
        processor: its processor.
        questions: one per image.
        pixels: normalised images [H, W, 3] float32.
        max_tokens: where an answer that does not end is cut.
        batch_size: questions per forward pass.

    Returns:
        The answers, in the order of the questions.
    """
    prompts = [processor.encode([{"role": "user", "content": question}], num_images=1).ids for question in questions]
    return answers_after(
        model, processor, prompts, lambda row: pixels[row][None], max_tokens=max_tokens, batch_size=batch_size
    )


def answers_after(
    model: Model,
    processor: Processor,
    prompts: Sequence[Ids],
    pixels: Callable[[int], np.ndarray | None],
    *,
    max_tokens: int = 32,
    batch_size: int = 64,
) -> list[str]:
    """How the model goes on after each prompt, choosing the likeliest token every time, as ``MLXEngine`` does.

    Prompts that are equally long share a batch, so nothing is padded and every answer is what the prompt would get
    alone, up to rounding.

    Args:
        model: the model.
        processor: its processor.
        prompts: token ids with image slots, each up to where an answer begins.
        pixels: normalised images [N, H, W, 3] float32 of a prompt by its index, or None; asked for when it is its turn.
        max_tokens: where an answer that does not end is cut.
        batch_size: prompts per forward pass.

    Returns:
        The answers without surrounding white space, in the order of the prompts.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        by_length[len(ids)].append(index)
    answers = [""] * len(prompts)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            images = [image for row in rows if (image := pixels(row)) is not None]
            batch = np.array([prompts[row] for row in rows])  # [B, L]
            found = _decode(model, processor, batch, np.concatenate(images) if images else None, max_tokens)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer.strip()
    return answers


def answer_text(processor: Processor, ids: Ids) -> str:
    """The text of an answer's ids, end marker and all, without surrounding white space: as ``answers_after`` has it."""
    stream = processor.answer_stream()
    return ("".join(stream.add(int(token))[0] for token in ids) + stream.finish()).strip()


def same_answer(given: str, wanted: str) -> bool:
    """Whether two answers are the same but for case, white space and a full stop at the end."""
    return _plain(given) == _plain(wanted)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _decode(
    model: Model, processor: Processor, ids: np.ndarray, pixels: np.ndarray | None, max_tokens: int
) -> list[str]:
    """The text that follows each row of ids [B, L]."""
    streams = [processor.answer_stream() for _ in ids]
    texts = [""] * len(ids)
    cache = make_cache(model)
    features = None if pixels is None else model.encode_images(mx.array(pixels))
    x, positions = model.embed(ids, features), model.positions(ids)
    for _ in range(max_tokens):
        logits = model.logits(model.hidden(x, cache, positions=positions)[:, -1:])  # [B, 1, V]
        # Neither the rows that pad the vocabulary nor an image slot is something to say.
        logits = logits[..., : processor.tokenizer.vocab_size]
        if 0 <= processor.image_token_id < logits.shape[-1]:
            logits[..., processor.image_token_id] = -mx.inf
        token = mx.argmax(logits, axis=-1)  # [B, 1]
        for row, value in enumerate(np.array(token)[:, 0].tolist()):
            texts[row] += streams[row].add(value)[0]
        if all(stream.stopped for stream in streams):
            break
        x, positions = model.language_model.embed(token), positions.next_token()
    return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]
