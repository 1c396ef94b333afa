"""From a model folder to what a recipe makes of it: the steps of ``gm-mlx quantize``, in their order.

``prepare`` packs nothing. A recipe changes tensors lazily (scaled weights, smaller routers) and decides on a table;
weights are packed, one after the other, when the result is measured in memory or written to a folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder, read_notes, write_model_folder
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.quant.awq import awq_scale
from gm_mlx.quant.build import build_model, dequantized, file_dtype
from gm_mlx.quant.calibration import Calibration, Sample, calibrate
from gm_mlx.quant.evaluate import Agreement, Progress, Question, compare, exact_match, record
from gm_mlx.quant.low_rank import low_rank_routers
from gm_mlx.quant.mixed import Measure, choose_mixed
from gm_mlx.quant.recipes import Plan, find_recipe, plan
from gm_mlx.quant.sizes import Size, component_sizes, total
from gm_mlx.tensors import Tensor

# Notes in gm.json that say something about the old weights only.
STALE = ("sha256", "exact_match", "exact_match_before_quantization", "quantization")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # they go wherever the weights go


@dataclass(frozen=True)
class Source:
    """A model folder that is to be quantized, with nothing packed in it any more.

    Attributes:
        folder: the folder.
        config: its config, without a quantization table.
        tensors: its tensors as floats, read when they are needed.
        processor: its processor.
        requantized: the folder's own quantization table, which has cost some precision already, or None.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    processor: Processor
    requantized: dict[str, Any] | None

    @cached_property
    def dtype(self) -> str | None:
        """What floats are written in; see ``file_dtype``."""
        return file_dtype(self.tensors)

    @property
    def notes(self) -> dict[str, Any]:
        """The folder's ``gm.json``."""
        return read_notes(self.folder)

    @property
    def gm(self) -> dict[str, Any]:
        """The folder's ``gm.json``, without what a new quantization makes untrue."""
        return {key: value for key, value in self.notes.items() if key not in STALE}

    def model(self) -> Model:
        """The unquantized model in memory, as its file's dtype has it."""
        return build_model(self.config, self.tensors)


def open_source(folder: Path, *, requantize: bool = False) -> Source:
    """Read a model folder's headers.

    Raises:
        UserError: the folder is no sound model, or its weights are quantized and ``requantize`` is false.
    """
    config = ModelConfig.load(folder)
    table = config.extra.get("quantization")
    if table is not None and not requantize:
        raise UserError(
            f"{folder}: its weights are quantized already; take the model it was made from, or add --requantize to "
            "round the rounded weights again"
        )
    tensors = read_model_folder(folder)
    processor = Processor.from_folder(folder)
    try:
        config, tensors = dequantized(config, tensors)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return Source(Path(folder), config, tensors, processor, table)


@dataclass
class Quantized:
    """What a recipe makes of a model.

    Attributes:
        recipe: the recipe's name.
        config: the config, without a quantization table.
        tensors: the tensors that are to be packed.
        plan: the table, and what was adjusted.
        sizes: by component.
        steps: reports of the steps that looked at the weights: "router", "awq", "mixed", "calibration".
        agreement: how close it stays to the unquantized model, once that was measured.
        exact_match: share of questions that it answers right, once that was measured.
    """

    recipe: str
    config: ModelConfig
    tensors: dict[str, Tensor]
    plan: Plan
    sizes: dict[str, Size]
    steps: dict[str, Any] = field(default_factory=dict)
    agreement: Agreement | None = None
    exact_match: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report, as JSON values."""
        whole = total(self.sizes)
        return {
            "recipe": self.recipe,
            "bytes": whole.bytes,
            "bits_per_weight": whole.bits_per_weight,
            "components": {
                name: {**size._asdict(), "bits_per_weight": size.bits_per_weight} for name, size in self.sizes.items()
            },
            "adjusted": self.plan.adjusted,
            **self.steps,
            **({} if self.agreement is None else {"agreement": self.agreement.to_dict()}),
            **({} if self.exact_match is None else {"exact_match": self.exact_match}),
        }


def prepare(
    source: Source,
    recipe: str,
    samples: Sequence[Sample] = (),
    *,
    calibration: Calibration | None = None,
    router_rank: int | None = None,
    target_bytes: int | None = None,
    measure: Measure = "auto",
    progress: Progress | None = None,
) -> Quantized:
    """Follow a recipe.

    Args:
        source: the model.
        recipe: a name of ``RECIPES``.
        samples: calibration prompts; needed by recipes that are ``calibrated``.
        calibration: what ``calibrate`` made of them; made here when the recipe needs it. With it, low-rank routers are
            the best for the activations that occur, and not for all that could.
        router_rank: make the routers of this rank.
        target_bytes: the budget of the recipe "mixed"; the others do not look at it.
        measure: how "mixed" measures; see ``choose_mixed``.
        progress: told (phase, steps done, steps).

    Raises:
        UserError: no such recipe, an option that the recipe or the model does not have, or samples that do not fit.
    """
    found = find_recipe(recipe)
    if recipe == "mixed" and target_bytes is None:
        raise UserError("recipe mixed: needs a budget; give --target-size")
    config, tensors, steps = source.config, dict(source.tensors), {}
    if recipe == "awq" and calibration is None:
        calibration = calibrate(source.model(), source.processor, samples, progress)
    if calibration is not None:
        steps["calibration"] = calibration.to_dict()
    if router_rank is not None:
        covariances, rows = (None, None) if calibration is None else (calibration.covariances, calibration.rows)
        config, tensors, routers = low_rank_routers(config, tensors, router_rank, covariances, rows)
        steps["router"] = routers.to_dict()
    chosen: Plan
    if recipe == "mixed":
        assert target_bytes is not None
        mixed = choose_mixed(
            config, tensors, source.processor, samples, target_bytes, measure=measure, progress=progress
        )
        chosen, steps["mixed"] = mixed, mixed.to_dict()
    else:
        chosen = plan(config, recipe)
    if recipe == "awq":
        assert calibration is not None
        tensors, scaling = awq_scale(config, tensors, calibration, chosen.table, progress)
        steps["awq"] = scaling.to_dict()
    steps["summary"] = found.summary
    return Quantized(recipe, config, tensors, chosen, component_sizes(config, chosen.table), steps)


def measure(
    source: Source,
    results: Sequence[Quantized],
    samples: Sequence[Sample],
    questions: Sequence[Question] = (),
    progress: Progress | None = None,
) -> float | None:
    """Hold results against the unquantized model, and note in each what is found. One model is in memory at a time.

    Args:
        source: the unquantized model.
        results: what recipes made of it.
        samples: prompts whose answers are compared; at least one.
        questions: questions with known answers, for ``exact_match``.
        progress: told (phase, steps done, steps).

    Returns:
        The unquantized model's share of right answers, or None without questions.

    Raises:
        UserError: a sample or a question's image does not fit the model.
    """
    with TemporaryDirectory(prefix="gm-mlx-") as folder:
        model = source.model()
        record(model, source.processor, samples, Path(folder), progress)
        baseline = exact_match(model, source.processor, questions) if questions else None
        del model
        for result in results:
            mx.clear_cache()
            model = build_model(result.config, result.tensors, result.plan.table, source.dtype)
            result.agreement = compare(model, Path(folder), progress)
            if questions:
                result.exact_match = exact_match(model, source.processor, questions)
            del model
    return baseline


def write(
    source: Source,
    result: Quantized,
    out: Path,
    card: str,
    notes: Mapping[str, Any],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the quantized model's folder, or nothing; see ``write_model_folder`` for errors.

    Args:
        source: the unquantized model.
        result: what a recipe made of it.
        out: the folder to be.
        card: its README.md.
        notes: what ``gm.json`` says beside the report: who made it, from what.
        force: replace a model folder that is there.
        progress: told ("write", bytes written, bytes in all).
    """
    licences = {file.name: file.read_bytes() for pattern in LICENCES for file in sorted(source.folder.glob(pattern))}
    write_model_folder(
        out,
        result.config,
        result.tensors,
        processor=source.processor,
        gm={**source.gm, "quantization": {**notes, **result.to_dict()}},
        card=card,
        quantization=result.plan.table,
        dtype=source.dtype,
        force=force,
        extra_files=licences,
        progress=progress,
    )
