"""From single values to figures: medians, the spread, and how one form stands to another.

Two machines, or one at two times of the day, give different figures; the ratio of two forms that took turns changes
much less. So ratios are taken round by round, and their median is the figure to quote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gm_mlx.bench.forms import Costs, Form
from gm_mlx.bench.rounds import Outcome, Sample, Settings

SPEED, SECONDS, BYTES = "tokens/s", "s", "bytes"
# In the order of a report. Names of speeds are llama-bench's: pp is reading a prompt, tg is generating, @ d is behind
# so many positions.
MEASURES = {
    "load": ("load", SECONDS),
    "encode": ("image encode", SECONDS),
    "pp": ("pp{tokens}", SPEED),
    "tg": ("tg{tokens}", SPEED),
    "tg_deep": ("tg{tokens} @ d{depth}", SPEED),
    "first": ("first token, image", SECONDS),
    "peak": ("peak memory", BYTES),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SMALLER_UNITS = {SECONDS: ("ms", 1e-3), BYTES: ("MB", 1 << 20)}
LARGER_UNITS = {SECONDS: ("s", 1.0), BYTES: ("GB", 1 << 30), SPEED: (SPEED, 1.0)}


@dataclass(frozen=True)
class Row:
    """A measure of one form.

    Attributes:
        form: the form's number.
        measure: a key of ``MEASURES``.
        test: its name for people.
        unit: "tokens/s", "s" or "bytes".
        values: one for each round.
        ratios: of the values to those of the first form in the same round; empty for the first form itself.
        tokens: what speeds are counted in.
        depth: positions that were in the cache before.
        joules: energy of each run, where the system tells it.
    """

    form: int
    measure: str
    test: str
    unit: str
    values: list[float]
    ratios: list[float]
    tokens: int
    depth: int
    joules: list[float]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        is_prompt = self.measure == "pp"
        return {
            "form": LETTERS[self.form],
            "test": self.test,
            "unit": self.unit,
            # llama-bench's keys, for scripts that read both.
            "n_prompt": self.tokens if is_prompt else 0,
            "n_gen": self.tokens if self.unit == SPEED and not is_prompt else 0,
            "n_depth": self.depth,
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "values": self.values,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "joules_per_token": median(self.joules) / self.tokens if self.joules and self.unit == SPEED else None,
            "joules": self.joules or None,
        }


@dataclass(frozen=True)
class Expectation:
    """What a form's weights and arithmetic say of its speed.

    Attributes:
        form: the form's number.
        active_bytes: bytes of the weights that a token uses.
        bytes_per_second: how fast these were read while generating, or None.
        of_predicted: generating speed, divided by what the first form's speed and both forms' active bytes predict.
        prefill_flops: FLOPs of the prompt, or None.
        flops_per_second: how fast these were done, or None.
    """

    form: int
    active_bytes: int
    bytes_per_second: float | None
    of_predicted: float | None
    prefill_flops: int | None
    flops_per_second: float | None


def rows(outcome: Outcome) -> list[Row]:
    """All measures of all forms that did not fail, ordered by measure and then by form."""
    forms = [form for form in sorted(outcome.facts) if form not in outcome.failures]
    out: list[Row] = []
    for measure, (name, unit) in MEASURES.items():
        reference: dict[int, float] = {}
        for form in forms:
            samples = [sample for sample in outcome.samples if (sample.form, sample.measure) == (form, measure)]
            if measure == "peak":
                samples = [Sample(form, measure, 0, float(outcome.peaks[form]), 1)]
            if not samples:
                continue
            by_round = {sample.round: _value(sample, unit) for sample in samples}
            ratios = [value / reference[number] for number, value in by_round.items() if number in reference]
            reference = reference or by_round
            last = samples[-1]
            joules = [sample.joules for sample in samples if sample.joules is not None]
            test = name.format(tokens=last.tokens, depth=last.depth)
            out.append(Row(form, measure, test, unit, list(by_round.values()), ratios, last.tokens, last.depth, joules))
    return out


def expectations(measured: Sequence[Row], costs: Sequence[Costs]) -> list[Expectation]:
    """What each measured form's files say of its speed."""
    out: list[Expectation] = []
    first: int | None = None
    for form in sorted({row.form for row in measured}):
        own = {row.measure: row for row in measured if row.form == form}
        cost, decode, prompt = costs[form], own.get("tg"), own.get("pp")
        first = form if first is None and decode else first
        out.append(
            Expectation(
                form=form,
                active_bytes=cost.active_bytes,
                bytes_per_second=decode.median * cost.active_bytes if decode else None,
                of_predicted=decode.ratio * cost.active_bytes / costs[first].active_bytes
                if decode and decode.ratio is not None and first is not None
                else None,
                prefill_flops=cost.prefill_flops(prompt.tokens) if prompt else None,
                flops_per_second=prompt.median / prompt.tokens * cost.prefill_flops(prompt.tokens) if prompt else None,
            )
        )
    return out


def to_dict(
    forms: Sequence[Form],
    costs: Sequence[Costs],
    settings: Settings,
    outcome: Outcome,
    machine: dict[str, Any],
    energy: str | None,
) -> dict[str, Any]:
    """Everything as JSON holds it.

    Args:
        forms: the forms.
        costs: their costs.
        settings: how they were measured.
        outcome: what was measured.
        machine: from ``machine_facts``.
        energy: why the energy is not known; None where it is.
    """
    measured = rows(outcome)
    expected = {each.form: vars(each) for each in expectations(measured, costs)}
    return {
        "machine": machine,
        "energy": energy or "of the processor packages, idle power included",
        "settings": {**vars(settings), "rounds_measured": outcome.rounds, "loaded_together": outcome.together},
        "forms": [
            {
                "form": LETTERS[number],
                "model": form.name,
                "engine": form.engine,
                "file": str(form.model),
                "mmproj": form.mmproj and str(form.mmproj),
                "weight_bytes": cost.weight_bytes,
                "active_bytes": cost.active_bytes,
                **{
                    key: value for key, value in expected.get(number, {}).items() if key not in ("form", "active_bytes")
                },
                "peak_memory_bytes": outcome.peaks.get(number),
                "runtime_peak_bytes": outcome.runtime_peaks.get(number),
                **outcome.facts.get(number, {}),
                "error": outcome.failures.get(number),
            }
            for number, (form, cost) in enumerate(zip(forms, costs, strict=True))
        ],
        "results": [row.to_dict() for row in measured],
    }


def scaled(unit: str, value: float) -> tuple[str, float]:
    """The unit to show values of this size in, and what to divide them by."""
    name, divisor = LARGER_UNITS[unit]
    return SMALLER_UNITS[unit] if unit in SMALLER_UNITS and value < divisor else (name, divisor)


def number(value: float) -> str:
    """A number in three digits, or in as many as it has before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _value(sample: Sample, unit: str) -> float:
    return sample.tokens / sample.seconds if unit == SPEED else sample.seconds
