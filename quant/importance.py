"""How much each input channel of a decoder's linears matters: sums of x^2 while the model reads pictures and questions.

It is what a quantizer of llama.cpp wants to know: an error in a weight shows in the output times the weight's input, so
of all ways to round a row it takes the one with the least sum of x^2 * error^2. llama.cpp's own tool reads text only.
Here the model reads prompts with images in them, so the channels count as they do when it looks at a picture.

An expert has sums of its own, over the tokens that the router gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.moe import SparseMLP
from gm_mlx.processor import Processor
from gm_mlx.quant.calibration import LAYERS, Tap
from gm_mlx.quant.samples import Sample, encode

# Of linears that read the same input, the first is watched.
QKV = ("q_proj", "k_proj", "v_proj")
OUT = ("o_proj",)
FIRST = {True: ("gate_proj", "up_proj"), False: ("fc1",)}  # by whether the network is gated
LAST = {True: ("down_proj",), False: ("fc2",)}


@dataclass
class Importance:
    """What went into the linears of a decoder.

    Attributes:
        num_samples: prompts that were read.
        num_tokens: their tokens, image positions among them.
        sums: by path of a linear: the sum of x^2 per input channel, float64 [E, C]; E is 1 but for stacked experts.
        counts: by path of a linear: over how many tokens, int64 [E].
    """

    num_samples: int = 0
    num_tokens: int = 0
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, paths: Sequence[str], sums: np.ndarray, counts: np.ndarray) -> None:
        """Add what flowed once into linears that read the same."""
        for path in paths:
            self.sums[path] = self.sums.get(path, 0) + sums
            self.counts[path] = self.counts.get(path, 0) + counts


def measure_importance(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    progress: Callable[[str, int, int], None] | None = None,
) -> Importance:
    """Let a model read samples, images included, and add up what goes into each linear of its decoder.

    Args:
        model: the model; it is the same afterwards, whatever happens. Eight bits or more serve best.
        processor: its processor.
        samples: what to read; at least one.
        progress: told ("calibrate", samples done, samples) after each.

    Raises:
        UserError: a sample does not fit the model's context, has images that the model cannot read, or makes it
            compute what is no number.
    """
    if not samples:
        raise UserError("importance: there are no samples; give at least one")
    found, context = Importance(), model.config.text_config.max_position_embeddings
    with _taps(model, found):
        for done, sample in enumerate(samples, start=1):
            ids, pixels = encode(processor, sample)
            if (length := ids.shape[1]) > context:
                raise UserError(
                    f"importance: sample {done} ({sample.prompt[:40]!r}) has {length} tokens but the model's context "
                    f"is {context}; shorten it or use fewer images"
                )
            features = None if pixels is None else model.encode_images(pixels)
            model.hidden(model.embed(ids, features))  # each tap evaluates what is needed up to it
            found.num_samples, found.num_tokens = done, found.num_tokens + length
            if progress is not None:
                progress("calibrate", done, len(samples))
    return found


@contextmanager
def _taps(model: Model, found: Importance) -> Iterator[None]:
    """Watch all linears of the decoder's layers; on leaving, every layer stands where it stood."""
    with ExitStack() as stack:

        def watch(path: str, parent: nn.Module, names: tuple[str, ...]) -> None:
            layer, paths = parent[names[0]], [f"{path}.{name}" for name in names]
            size = getattr(layer, "num_experts", None)
            stack.callback(parent.__setitem__, names[0], layer)

            def see(x: mx.array, y: mx.array, experts: mx.array | None = None) -> None:
                if experts is None:
                    sums, counts = _dense_sums(paths[0], x)
                else:
                    assert size is not None
                    sums, counts = _expert_sums(paths[0], x, experts, size)
                found.add(paths, sums, counts)

            parent[names[0]] = Tap(layer, see)

        for i, block in enumerate(model.layers):
            path, mlp = f"{LAYERS}.{i}", block.mlp
            watch(f"{path}.self_attn", block.self_attn, QKV)
            watch(f"{path}.self_attn", block.self_attn, OUT)
            networks: dict[str, Any] = {f"{path}.mlp": mlp}
            if isinstance(mlp, SparseMLP):
                networks = {f"{path}.mlp.switch_mlp": mlp.switch_mlp}
                if "mlp" in mlp:
                    networks[f"{path}.mlp.mlp"] = mlp.mlp
            for place, network in networks.items():
                gated = "gate_proj" in network
                watch(place, network, FIRST[gated])
                watch(place, network, LAST[gated])
        yield


def _dense_sums(path: str, x: mx.array) -> tuple[np.ndarray, np.ndarray]:
    rows = _rows(path, x, x.shape[:-1])
    return np.square(rows, dtype=np.float64).sum(axis=0)[None], np.array([len(rows)])


def _expert_sums(path: str, x: mx.array, experts: mx.array, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums [E, C] and counts [E] of inputs [..., 1, C], each for the expert of an index [...]."""
    chosen = np.array(experts)
    rows = _rows(path, x.squeeze(-2), chosen.shape)  # [N, C]; a token's one input goes to each of its experts
    chosen = chosen.reshape(-1)
    sums = [np.square(rows[chosen == e], dtype=np.float64).sum(axis=0) for e in range(size)]
    return np.stack(sums), np.bincount(chosen, minlength=size)


def _rows(path: str, x: mx.array, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [N, C] of x [..., C], whose leading axes are stretched to ``shape``."""
    rows = np.array(x.astype(mx.float32))
    if not np.isfinite(rows).all():
        raise UserError(f"importance: {path} reads what is no number; the model's weights are damaged, or too large")
    return np.broadcast_to(rows, (*shape, rows.shape[-1])).reshape(-1, rows.shape[-1])
