"""What quantization does to a model's answers: divergence, agreement and routing, against the unquantized model.

The unquantized model answers each calibration prompt greedily, and both models then read prompt and answer. Compared is
what they predict where the answer stands: those positions are what a user sees, and the ones before them are not.

The two models need not be in memory together: ``record`` writes what the first one says to a folder, sample by sample,
and ``compare`` reads it back sample by sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.generate import make_cache
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.quant.calibration import Sample, encode
from gm_mlx.router import Routing
from gm_mlx.train.answers import greedy_answers, same_answer

ANSWER_TOKENS = 16  # an answer's later tokens depend on its first ones: more of them tell little more

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """A prompt with an answer, as both models read it.

    Attributes:
        ids: int [1, L].
        pixels: float32 [N, size, size, 3], or None.
        start: the first position whose prediction counts, the last one of the prompt.
        vocab_size: ids from here on pad the embedding rows; they are never said and do not count.
    """

    ids: np.ndarray
    pixels: mx.array | None
    start: int
    vocab_size: int


@dataclass(frozen=True)
class Observation:
    """What a model makes of a case.

    Attributes:
        log_probs: of each next token at the n positions that count, float32 [n, V].
        experts: chosen experts of all positions, best first, by sparse layer: [L, k].
    """

    log_probs: np.ndarray
    experts: dict[int, np.ndarray]


@dataclass
class Agreement:
    """How close a model stays to its reference.

    Attributes:
        kl: mean divergence KL(reference || model) in nats, over positions that count.
        top1: share of these positions where both find the same token likeliest.
        positions: how many there were.
        routing_top1: share of tokens whose first expert is the same, mean over sparse layers; None without any.
        routing_set: share of tokens whose chosen experts are the same, in any order.
        layers: by sparse layer: its two shares.
    """

    kl: float
    top1: float
    positions: int
    routing_top1: float | None = None
    routing_set: float | None = None
    layers: dict[int, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        layers = {str(layer): {"top1": first, "set": both} for layer, (first, both) in self.layers.items()}
        return {
            "kl": self.kl,
            "top1": self.top1,
            "positions": self.positions,
            "routing_top1": self.routing_top1,
            "routing_set": self.routing_set,
            "routing_layers": layers,
        }


def answered(model: Model, processor: Processor, sample: Sample, answer_tokens: int = ANSWER_TOKENS) -> Case:
    """A sample with the model's own greedy answer behind it.

    Raises:
        UserError: the sample does not fit the model's context.
    """
    ids, pixels = encode(processor, sample)
    length = ids.shape[1]
    if length > (context := model.config.text_config.max_position_embeddings):
        raise UserError(
            f"calibration: the sample {sample.prompt[:40]!r} has {length} tokens but the model's context is {context}; "
            "shorten it or use fewer images"
        )
    cache = make_cache(model)
    x, positions = model.embed(ids, None if pixels is None else model.encode_images(pixels)), model.positions(ids)
    answer: list[int] = []
    vocab_size = processor.tokenizer.vocab_size
    for _ in range(min(answer_tokens, context - length)):
        logits = model.logits(model.hidden(x, cache, positions=positions)[:, -1:])[0, 0, :vocab_size]
        allowed = mx.arange(logits.size) != processor.image_token_id
        token = int(np.array(mx.argmax(mx.where(allowed, logits, -mx.inf))))
        if token in processor.stop_ids:
            break  # that the answer ends here is the last prediction that counts
        answer.append(token)
        x, positions = model.language_model.embed(mx.array([[token]])), positions.next_token()
    ids = np.concatenate([ids, np.array([answer], ids.dtype).reshape(1, -1)], axis=1)
    return Case(ids, pixels, length - 1, vocab_size)


def observe(model: Model, case: Case, embeddings: mx.array | None = None) -> Observation:
    """What a model makes of a case; ``embeddings`` [1, L, D] when they are known already."""
    if embeddings is None:
        embeddings = model.embed(case.ids, None if case.pixels is None else model.encode_images(case.pixels))
    trace: list[Routing] = []
    hidden = model.hidden(embeddings, trace=trace, positions=model.positions(case.ids))
    logits = model.logits(hidden[:, case.start :])[0, :, : case.vocab_size].astype(mx.float32)  # [n, V]
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(log_probs, [routing.experts for routing in trace])
    return Observation(np.array(log_probs), {routing.layer: np.array(routing.experts[0]) for routing in trace})


def divergence(reference: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats, [n] of log-probabilities [n, V] and [n, V]."""
    p, q = reference.astype(np.float64), log_probs.astype(np.float64)
    # Rounding can leave a tiny negative sum, which no divergence is.
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def record(
    model: Model, processor: Processor, samples: Sequence[Sample], folder: Path, progress: Progress | None = None
) -> None:
    """Write what the reference model makes of the samples to an empty folder, for ``compare``.

    A file per sample holds its case and its observation: 17 MB with Gemma's vocabulary.

    Raises:
        UserError: a sample does not fit the model.
    """
    for index, sample in enumerate(samples):
        case = answered(model, processor, sample)
        seen = observe(model, case)
        arrays = {f"experts.{layer}": experts for layer, experts in seen.experts.items()}
        if case.pixels is not None:
            arrays["pixels"] = np.array(case.pixels)
        arrays |= {"ids": case.ids, "start": np.array(case.start), "log_probs": seen.log_probs}
        np.savez(folder / f"{index:05d}.npz", **arrays)  # type: ignore[arg-type]
        if progress is not None:
            progress("reference", index + 1, len(samples))


def compare(model: Model, folder: Path, progress: Progress | None = None) -> Agreement:
    """How close a model stays to what ``record`` wrote to the folder.

    Raises:
        ValueError: the folder holds no record.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ValueError(f"{folder}: no record of a reference model")
    kl: list[np.ndarray] = []
    top1: list[np.ndarray] = []
    routing: dict[int, list[np.ndarray]] = {}  # by layer: [L, 2] of agreement in the first expert and in the set
    for index, file in enumerate(files):
        with np.load(file) as arrays:
            pixels = mx.array(arrays["pixels"]) if "pixels" in arrays else None
            reference = Observation(
                arrays["log_probs"],
                {int(name.removeprefix("experts.")): arrays[name] for name in arrays if name.startswith("experts.")},
            )
            case = Case(arrays["ids"], pixels, int(arrays["start"]), reference.log_probs.shape[-1])
        seen = observe(model, case)
        kl.append(divergence(reference.log_probs, seen.log_probs))
        top1.append(reference.log_probs.argmax(axis=-1) == seen.log_probs.argmax(axis=-1))
        for layer, experts in reference.experts.items():
            routing.setdefault(layer, []).append(_same_experts(experts, seen.experts[layer]))
        if progress is not None:
            progress("compare", index + 1, len(files))
    layers = {layer: np.concatenate(same).mean(axis=0) for layer, same in routing.items()}
    routing_top1, routing_set = map(float, np.mean(list(layers.values()), axis=0)) if layers else (None, None)
    return Agreement(
        kl=float(np.concatenate(kl).mean()),
        top1=float(np.concatenate(top1).mean()),
        positions=len(np.concatenate(kl)),
        routing_top1=routing_top1,
        routing_set=routing_set,
        layers={layer: (float(same[0]), float(same[1])) for layer, same in layers.items()},
    )


def _same_experts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool [L, 2]: whether the first expert is the same, and whether the set is, of choices [L, k] and [L, k]."""
    return np.stack([a[:, 0] == b[:, 0], (np.sort(a, axis=1) == np.sort(b, axis=1)).all(axis=1)], axis=1)


@dataclass(frozen=True)
class Question:
    """A question about an image file, and its one right answer."""

    image: Path
    question: str
    answer: str


QUESTION_EXAMPLE = '{"image": "cat.jpg", "question": "What is this?", "answer": "a cat"}'


def load_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a ``.jsonl`` file, of which each line is like ``QUESTION_EXAMPLE``; other keys are left alone.

    Args:
        path: the file; images are named from its folder.
        limit: take so many, evenly spread over the file.

    Raises:
        UserError: the file or one of its lines cannot be read, or an image is not there; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a .jsonl file of questions") from None
    questions = [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{path}: has no questions; each line must be like {QUESTION_EXAMPLE}")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _question(path: Path, number: int, line: str) -> Question:
    try:
        values = json.loads(line)
        texts = [values[key] for key in ("image", "question", "answer")]
    except (ValueError, RecursionError, KeyError, TypeError):
        texts = []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{path} line {number}: must be like {QUESTION_EXAMPLE}")
    image = path.parent / texts[0]
    if not image.is_file():
        raise UserError(f"{path} line {number}: {image} is not there; images are named from the file's folder")
    return Question(image, texts[1], texts[2])


def exact_match(model: Model, processor: Processor, questions: Sequence[Question], batch: int = 64) -> float:
    """Share of questions whose greedy answer is the right one, but for case, surrounding space and a last full stop.

    Raises:
        UserError: an image cannot be read.
    """
    right = 0
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        pixels = [processor.pixels([question.image])[0] for question in asked]
        given = greedy_answers(model, processor, [question.question for question in asked], pixels)
        right += sum(same_answer(a, q.answer) for a, q in zip(given, asked, strict=True))
    return right / len(questions)
