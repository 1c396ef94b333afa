"""What is kept of a run that has ended: a table for ``gm.json``, and a few sentences for a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gm_mlx.train.config import TrainConfig
from gm_mlx.train.events import Finished
from gm_mlx.train.log import LOG
from gm_mlx.train.prepare import Prepared


def record(
    folder: Path, finished: Finished, config: TrainConfig, prepared: Prepared, batch_size: int
) -> dict[str, Any]:
    """What a run did, from its folder and its parts.

    Returns:
        JSON values: ``steps``, ``batch_size``, ``learning_rate``, ``schedule``, ``seed``, ``rows``, ``images``,
        ``held_out`` (rows), ``data`` (a fingerprint), ``stopped_early``, ``first_loss`` and ``loss`` (means of the
        log's first and last line), ``seconds``, ``tokens`` (positions that were computed), and ``validation``: step and
        figures of the weights that the run ended with, or None without a hold-out.
    """
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if line["kind"] == "log"]
    validations = {line["step"]: line for line in lines if line["kind"] == "validation"}
    last = finished.best_step if finished.restored_best else max(validations, default=None)
    validation = None if last is None else {k: v for k, v in validations[last].items() if k not in ("kind", "seconds")}
    return {
        "steps": finished.step,
        "batch_size": batch_size,
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "seed": config.seed,
        "rows": len(prepared.train),
        "images": len(prepared.train.images),
        "held_out": len(prepared.held_out),
        "data": prepared.train.fingerprint(),
        "stopped_early": finished.stopped_early,
        "first_loss": logged[0]["loss"] if logged else None,
        "loss": finished.loss,
        "seconds": round(sum(line["seconds"] for line in logged), 2),
        "tokens": sum(line["positions"] for line in logged),
        "validation": validation,
    }


def record_text(table: Mapping[str, Any]) -> str:
    """A ``record`` in words."""
    text = (
        f"{table['steps']:,} steps of {table['batch_size']} rows, from {table['rows']:,} rows with "
        f"{table['images']:,} images; learning rate {table['learning_rate']:g} ({table['schedule']}). "
        f"The loss went from {table['first_loss']:.3g} to {table['loss']:.3g}."
    )
    if (validation := table["validation"]) is None:
        return text
    exact = f", and {validation['exact_match']:.1%} of the answers are exact" if "exact_match" in validation else ""
    return f"{text} On {table['held_out']:,} rows held out the loss is {validation['loss']:.3g}{exact}."
