"""Calibration: what flows through a model's feed-forward networks while it reads pictures and questions.

The model is watched, not changed: for the time of a calibration some of its layers stand inside a ``Tap`` that notes
what comes in. One sample is computed at a time and every tap evaluates what it adds up, so memory holds the sums, a few
thousand activations per layer, and what one layer makes of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.evf import ElasticFFN
from gm_mlx.model import Model
from gm_mlx.moe import SparseMLP
from gm_mlx.processor import Processor
from gm_mlx.quant.samples import Sample, encode, load_samples
from gm_mlx.router import Positions, choose

__all__ = [
    "LAYERS",
    "Activations",
    "Calibration",
    "Sample",
    "calibrate",
    "encode",
    "experts_path",
    "load_samples",
]

LAYERS = "language_model.model.layers"
ROWS = 4096  # activations that are kept per layer


@dataclass
class Activations:
    """What one feed-forward network saw, or each of the experts of one layer. A dense network counts as one expert.

    Attributes:
        tokens: tokens per expert, int64 [E].
        inputs: mean of |x| per channel of the network's input, over the expert's tokens, float64 [E, D].
        hidden: mean of |h| per channel of what its last projection reads, float64 [E, F].

    A row of an expert without tokens is zero.
    """

    tokens: np.ndarray
    inputs: np.ndarray
    hidden: np.ndarray


@dataclass
class Calibration:
    """Statistics of a model's feed-forward layers.

    Attributes:
        num_samples: prompts that were read.
        num_tokens: their tokens, image positions among them.
        networks: by module path: of stacked experts (``...mlp.switch_mlp``), of a dense layer (``...mlp``) and of the
            dense network beside experts (``...mlp.mlp``). Of an elastic layer the two networks together, as if they
            were stacked experts, without what is hidden in them.
        covariances: by index of a sparse layer: mean of x x^T over all tokens, x the router's input, float64 [D, D].
        rows: by layer: inputs of its feed-forward network, drawn at random from all tokens, float32 [n, D].
    """

    num_samples: int = 0
    num_tokens: int = 0
    networks: dict[str, Activations] = field(default_factory=dict)
    covariances: dict[int, np.ndarray] = field(default_factory=dict)
    rows: dict[int, np.ndarray] = field(default_factory=dict)

    def tokens_per_expert(self) -> dict[int, list[int]]:
        """By index of a sparse layer: how many tokens each expert saw."""
        return {layer: self.networks[experts_path(layer)].tokens.tolist() for layer in self.covariances}

    def to_dict(self) -> dict[str, Any]:
        """The counts, as JSON values."""
        return {
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "tokens_per_expert": {str(layer): tokens for layer, tokens in self.tokens_per_expert().items()},
        }


def experts_path(layer: int) -> str:
    """Module path of a sparse layer's stacked experts."""
    return f"{LAYERS}.{layer}.mlp.switch_mlp"


def calibrate(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    max_rows: int = ROWS,
) -> Calibration:
    """Let a model read samples and note what flows through its feed-forward networks.

    Args:
        model: the model; it is the same afterwards, whatever happens.
        processor: its processor.
        samples: what to read; at least one.
        progress: told ("calibrate", samples done, samples) after each.
        max_rows: most activations that are kept per layer.

    Raises:
        UserError: a sample does not fit the model's context, or has images that the model cannot read.
    """
    if not samples:
        raise UserError("calibration: there are no samples; give at least one")
    watch = _Watch(model)
    random = np.random.default_rng(0)
    kept: dict[int, list[np.ndarray]] = {layer: [] for layer in range(len(model.layers))}
    num_kept = 0
    with watch.taps():
        for done, sample in enumerate(samples):
            ids, pixels = encode(processor, sample)
            length = ids.shape[1]
            if length > (context := model.config.text_config.max_position_embeddings):
                raise UserError(
                    f"calibration: sample {done + 1} ({sample.prompt[:40]!r}) has {length} tokens but the model's "
                    f"context is {context}; shorten it or use fewer images"
                )
            # An even share of what may still be kept; what short prompts leave of theirs goes to later ones.
            share = min(length, -(-(max_rows - num_kept) // (len(samples) - done)))
            watch.chosen = np.sort(random.choice(length, share, replace=False))
            num_kept += share
            features = None if pixels is None else model.encode_images(pixels)
            watch.positions = model.positions(ids)
            # Each tap evaluates what is needed up to it.
            model.hidden(model.embed(ids, features), positions=watch.positions)
            for layer, rows in watch.rows.items():
                kept[layer].append(rows)
            watch.rows = {}
            watch.calibration.num_tokens += length
            watch.calibration.num_samples += 1
            if progress is not None:
                progress("calibrate", done + 1, len(samples))
    # A layer's router may have seen nothing: an elastic one reads requests with images only.
    return watch.result({layer: np.concatenate(rows) for layer, rows in kept.items() if rows})


class Tap(nn.Module):
    """A layer that shows what it is called with, and what it returns, before it hands it on."""

    def __init__(self, layer: nn.Module, see: Callable[..., None]) -> None:
        super().__init__()
        self.layer = layer
        self.see = see

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        y = self.layer(x, *args, **options)
        self.see(x, y, *args)
        return y


class _Watch:
    """The running sums of a calibration, and the taps that feed them.

    Attributes:
        chosen: positions of the current sample whose activations are kept.
        positions: what sparse layers know of the current sample.
        rows: by layer: those activations.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calibration = Calibration()
        self.chosen = np.zeros(0, np.int64)
        self.positions = Positions()
        self.rows: dict[int, np.ndarray] = {}

    @contextmanager
    def taps(self) -> Iterator[None]:
        """Tap the feed-forward networks of all layers; on leaving, every layer stands where it stood."""
        tapped: list[tuple[nn.Module, str, nn.Module]] = []

        def tap(parent: nn.Module, name: str, see: Callable[..., None]) -> None:
            tapped.append((parent, name, parent[name]))
            parent[name] = Tap(parent[name], see)

        def tap_dense(path: str, mlp: nn.Module, layer: int | None) -> None:
            first, last = ("gate_proj", "down_proj") if "gate_proj" in mlp else ("fc1", "fc2")
            tap(mlp, first, lambda x, y: self._see_input(path, x, layer))
            tap(mlp, last, lambda x, y: self._see_hidden(path, x))

        try:
            for layer, block in enumerate(self.model.layers):
                path = f"{LAYERS}.{layer}.mlp"
                if isinstance(block.mlp, SparseMLP):
                    self._tap_sparse(tap, layer, block.mlp)
                    if "mlp" in block.mlp:
                        tap_dense(f"{path}.mlp", block.mlp.mlp, None)
                elif isinstance(block.mlp, ElasticFFN):
                    self._tap_elastic(tap, layer, block.mlp)
                else:
                    tap_dense(path, block.mlp, layer)
            yield
        finally:
            for parent, name, original in tapped:
                parent[name] = original

    def _tap_sparse(self, tap: Callable[..., None], layer: int, mlp: SparseMLP) -> None:
        path = experts_path(layer)
        last = "down_proj" if "down_proj" in mlp.switch_mlp else "fc2"
        size = mlp.switch_mlp[last].num_experts

        def see_router(x: mx.array, logits: mx.array) -> None:
            _, experts, _ = choose(logits, mlp.top_k, mlp.norm_topk_prob)
            self._see_input(path, x, layer, _one_hot(experts, size).sum(axis=-2))
            self._see_covariance(layer, x)

        def see_last(x: mx.array, y: mx.array, experts: mx.array) -> None:
            self._see_hidden(path, x, _one_hot(experts, size))

        tap(mlp, "gate", see_router)
        tap(mlp.switch_mlp, last, see_last)

    def _tap_elastic(self, tap: Callable[..., None], layer: int, mlp: ElasticFFN) -> None:
        def see_router(x: mx.array, logits: mx.array) -> None:
            experts = mlp.route(logits, self.positions).experts
            self._see_input(experts_path(layer), x, layer, _one_hot(experts, 2).sum(axis=-2))
            self._see_covariance(layer, x)

        tap(mlp, "gate", see_router)

    def _see_covariance(self, layer: int, x: mx.array) -> None:
        wide = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1]).astype(np.float64)
        # In float64: the few channels that dwarf all others must not drown what tells experts apart.
        self.calibration.covariances[layer] = self.calibration.covariances.get(layer, 0) + wide.T @ wide

    def _see_input(self, path: str, x: mx.array, layer: int | None, members: mx.array | None = None) -> None:
        """Add inputs [1, L, D] of a network; ``layer`` when they are the layer's own, to keep some of them."""
        tokens, sums = _sums(x, members)
        seen = self._activations(path)
        seen.tokens, seen.inputs = seen.tokens + tokens.astype(np.int64), seen.inputs + sums
        if layer is not None:
            self.rows[layer] = np.array(x.reshape(-1, x.shape[-1])[mx.array(self.chosen)].astype(mx.float32))

    def _see_hidden(self, path: str, x: mx.array, members: mx.array | None = None) -> None:
        seen = self._activations(path)
        seen.hidden = seen.hidden + _sums(x, members)[1]

    def _activations(self, path: str) -> Activations:
        zero = np.zeros(())
        return self.calibration.networks.setdefault(path, Activations(zero.astype(np.int64), zero, zero))

    def result(self, rows: dict[int, np.ndarray]) -> Calibration:
        """The sums as means."""
        calibration = self.calibration
        calibration.rows = rows
        calibration.covariances = {i: total / calibration.num_tokens for i, total in calibration.covariances.items()}
        for seen in calibration.networks.values():
            per_expert = np.maximum(seen.tokens, 1)[:, None]
            seen.inputs, seen.hidden = seen.inputs / per_expert, seen.hidden / per_expert
        return calibration


def _one_hot(experts: mx.array, size: int) -> mx.array:
    """float32 [..., E] of expert indices [...]."""
    return (experts[..., None] == mx.arange(size)).astype(mx.float32)


def _sums(x: mx.array, members: mx.array | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [E] and sums of |x| [E, C] per expert, of x [..., C]; members [..., E] are one where x is an expert's."""
    x = mx.abs(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    members = mx.ones((len(x), 1)) if members is None else members.reshape(len(x), -1)
    tokens, sums = members.sum(axis=0), members.T @ x
    mx.eval(tokens, sums)
    return np.array(tokens), np.array(sums).astype(np.float64)
