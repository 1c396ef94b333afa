"""Two forms of one model side by side: where their numbers part, and by how much.

Pixels and token ids are made by both and compared too, but the second model is given the first one's. So a difference
in preprocessing shows in these two stages and nowhere else, and a difference in a later stage is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.processor import Processor
from gm_mlx.stages import Limits, Precision, Question, Side, Trace, make_inputs

# The largest relative error that is taken for rounding. Float32 on both sides leaves a few millionths per layer; half
# precision a few thousandths, and large activations carry them on. Quantized models differ everywhere, and only the
# logits are judged: by what is left of a 4-bit model when it still answers alike.
EXACT_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.05
QUANTIZED_TOLERANCE = 0.2
PREPROCESSING = ("pixels", "ids")


@dataclass(frozen=True)
class Difference:
    """How far apart two models are at one stage, over all questions.

    Attributes:
        stage: its name.
        error: the largest of max |a - b| / max |a|; of ids, the largest share that differs.
        cosine: the smallest cosine of the two, flattened; None for ids.
        limit: the largest error that passes; None where the stage is not judged.
    """

    stage: str
    error: float
    cosine: float | None
    limit: float | None

    @property
    def passes(self) -> bool:
        return self.limit is None or self.error <= self.limit


@dataclass(frozen=True)
class RoutingAgreement:
    """Shares of positions that go to the same first expert, and to the same experts in any order."""

    layer: int
    first: float
    chosen: float


@dataclass(frozen=True)
class Answers:
    """The greedy answers to one question, and how many tokens they begin with in common."""

    prompt: str
    a: str
    b: str
    common_tokens: int
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """The outcome.

    Attributes:
        tolerance: the largest relative error that passes.
        stages: every stage that both models have, in the order of computation.
        routing: every layer that is sparse in both with as many experts per token.
        answers: one for each question.
        skipped: stages that were not compared, or are not judged, and why.
    """

    tolerance: float
    stages: list[Difference]
    routing: list[RoutingAgreement]
    answers: list[Answers]
    skipped: dict[str, str]

    @property
    def agrees(self) -> bool:
        """Whether every judged stage passes."""
        return all(difference.passes for difference in self.stages)

    @property
    def parts_at(self) -> str | None:
        """The first stage whose error is above the tolerance, judged or not."""
        above = (d for d in self.stages if d.error > (self.tolerance if d.limit is None else d.limit))
        return next((difference.stage for difference in above), None)


def compare(
    a: Side, b: Side, questions: Sequence[Question], *, max_tokens: int = 16, tolerance: float | None = None
) -> Comparison:
    """Run two models on the same questions, one after the other.

    Args:
        a: the reference.
        b: the other.
        questions: at least one.
        max_tokens: most tokens of the greedy answers.
        tolerance: the largest relative error that passes. By default 1e-3 where both compute in float32 and store the
            same precision, 0.05 where one stores or computes less, and 0.2 where one is quantized: then only pixels,
            ids and logits are judged.

    Raises:
        UserError: neither side has a processor, or the two are not forms of one model.
    """
    if not questions or max_tokens < 1:
        raise UserError("nothing to compare: ask one question and one token of answer at least")
    processors = [side.processor for side in (a, b) if side.processor is not None]
    if not processors:
        raise UserError(f"{b.name}: no gm-mlx model folder, and neither is {a.name}; one of the two must be one")
    _check_shapes(a, b)
    read = [[make_inputs(processor, question) for question in questions] for processor in processors]
    limits = Limits(
        max_tokens,
        min(processor.tokenizer.vocab_size for processor in processors),
        frozenset.union(*(processor.stop_ids for processor in processors)),
    )
    precision_a, traces_a = a.run(read[0], limits)
    precision_b, traces_b = b.run(read[0], limits)
    quantized = precision_a.quantized or precision_b.quantized
    if tolerance is None:
        tolerance = default_tolerance(precision_a, precision_b)

    found: dict[str, list[tuple[float, float | None]]] = {}
    skipped = {}
    if len(read) == 2:
        for first, second in zip(*read, strict=True):
            if first.pixels is not None and second.pixels is not None:
                found.setdefault("pixels", []).append(difference(first.pixels, second.pixels))
            found.setdefault("ids", []).append((_ids_apart(first.ids, second.ids), None))
    else:
        skipped = dict.fromkeys(PREPROCESSING, "not compared: one side is a PyTorch model and was given the other's")
    caveats = {**a.caveats, **b.caveats}
    for one, other in zip(traces_a, traces_b, strict=True):
        if hidden := one.stages.keys() ^ other.stages.keys():
            skipped["what lies between"] = f"{len(hidden)} stages are not compared: one side does not show them"
        for stage, value in one.stages.items():
            if stage not in other.stages:
                continue
            if value.shape != other.stages[stage].shape:
                raise UserError(f"{stage}: {value.shape} and {other.stages[stage].shape}; not two forms of one model")
            found.setdefault(stage, []).append(difference(value, other.stages[stage]))

    stages = []
    for stage in sorted(found, key=list(_order(found)).index):
        judged = stage not in caveats and (not quantized or stage in (*PREPROCESSING, "logits"))
        limit = 0.0 if stage == "ids" else EXACT_TOLERANCE if stage == "pixels" else tolerance if judged else None
        cosines = [cosine for _, cosine in found[stage] if cosine is not None]
        stages.append(Difference(stage, max(e for e, _ in found[stage]), min(cosines, default=None), limit))
    answers = [
        _answers(processors[0], question.prompt, one.answer, other.answer)
        for question, one, other in zip(questions, traces_a, traces_b, strict=True)
    ]
    skipped |= {stage: why for stage, why in caveats.items() if stage in found}
    return Comparison(tolerance, stages, _routing(traces_a, traces_b), answers, skipped)


def default_tolerance(a: Precision, b: Precision) -> float:
    """The largest relative error that rounding explains."""
    if a.quantized or b.quantized:
        return QUANTIZED_TOLERANCE
    exact = a.stored == b.stored and a.computed == b.computed == "float32"
    return EXACT_TOLERANCE if exact else HALF_TOLERANCE


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Relative error max |a - b| / max |a| and cosine of two arrays of one shape; infinity and 0 for anything else."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf"), 0.0
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    largest = float(np.abs(a - b).max())
    if largest == 0:
        return 0.0, 1.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    scale = float(np.abs(a).max())
    return largest / scale if scale else float("inf"), float(a @ b) / norms if norms else 0.0


def _check_shapes(a: Side, b: Side) -> None:
    """Refuse two models that no stage could be compared of."""
    if a.config is None or b.config is None:
        return
    pairs = {
        "hidden_size": (a.config.text_config.hidden_size, b.config.text_config.hidden_size),
        "num_hidden_layers": (a.config.text_config.num_hidden_layers, b.config.text_config.num_hidden_layers),
        "image_size": (a.config.vision_config.image_size, b.config.vision_config.image_size),
        "tokens per image": (a.config.num_image_tokens, b.config.num_image_tokens),
    }
    for key, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"{b.name}: {key} is {other} where {a.name} has {one}; they are not forms of one model")


def _order(found: Mapping[str, Any]) -> list[str]:
    """All stages in the order of computation; the first question may be one without images."""
    first = [*PREPROCESSING, "tower", "projector"]
    return [*first, *(stage for stage in found if stage not in first)]


def _ids_apart(a: np.ndarray, b: np.ndarray) -> float:
    return float((a != b).mean()) if a.shape == b.shape else 1.0


def _routing(traces_a: Sequence[Trace], traces_b: Sequence[Trace]) -> list[RoutingAgreement]:
    out = []
    for layer in traces_a[0].experts:
        if layer not in traces_b[0].experts:
            continue
        a = np.concatenate([each.experts[layer] for each in traces_a])  # [positions, k]
        b = np.concatenate([each.experts[layer] for each in traces_b])
        if a.shape == b.shape:
            same = (np.sort(a, axis=1) == np.sort(b, axis=1)).all(axis=1)
            out.append(RoutingAgreement(layer, float((a[:, 0] == b[:, 0]).mean()), float(same.mean())))
    return out


def _answers(processor: Processor, prompt: str, a: list[int], b: list[int]) -> Answers:
    common = next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    return Answers(prompt, _text(processor, a), _text(processor, b), common, max(len(a), len(b)))


def _text(processor: Processor, ids: list[int]) -> str:
    stream = processor.answer_stream()
    return "".join([*(stream.add(token)[0] for token in ids), stream.finish()])
