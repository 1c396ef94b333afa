"""Greedy answers to many questions at once, for measuring exact match while and after training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from gm_mlx._mlx_lm import KVCache
from gm_mlx.model import Model
from gm_mlx.processor import Processor


def greedy_answers(
    model: Model,
    processor: Processor,
    questions: Sequence[str],
    pixels: Sequence[np.ndarray],
    *,
    max_tokens: int = 32,
    batch_size: int = 64,
) -> list[str]:
    """The model's first answer to each question about its image.

    Questions whose prompts are equally long share a batch, so nothing is padded and every answer is what the question
    would get alone, up to rounding.

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
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        by_length[len(ids)].append(index)
    answers = [""] * len(questions)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            batch = np.array([prompts[row] for row in rows])
            images = mx.array(np.stack([pixels[row] for row in rows]))
            for row, answer in zip(rows, _decode(model, processor, batch, images, max_tokens), strict=True):
                answers[row] = processor.tokenizer.decode(answer).strip()
    return answers


def _decode(model: Model, processor: Processor, ids: np.ndarray, images: mx.array, max_tokens: int) -> list[list[int]]:
    """Token ids of each row's answer, without the token that ended it."""
    cache = [KVCache() for _ in model.layers]
    answers: list[list[int]] = [[] for _ in ids]
    running = np.ones(len(ids), dtype=bool)
    x = model.embed(ids, model.encode_images(images))
    for _ in range(max_tokens):
        hidden = model.hidden(x, cache)
        token = mx.argmax(model.logits(hidden[:, -1:]), axis=-1)  # [B, 1]
        for row, value in enumerate(np.array(token)[:, 0].tolist()):
            running[row] &= value not in processor.stop_ids
            if running[row]:
                answers[row].append(value)
        if not running.any():
            break
        x = model.language_model.embed(token)
    return answers
