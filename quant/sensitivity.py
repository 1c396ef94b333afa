"""How much each part of a decoder suffers from few bits.

A part is what one layer has of one component: its experts, its attention, its dense FFN; and the embeddings and the
head. Each is rounded by itself to each of ``OPTIONS`` while everything else keeps its floats, and the damage is noted:

- ``kl``: the divergence of the model's answers on calibration prompts. What is wanted is measured, at the price of one
  pass through the model per part and option.
- ``layer``: the squared error of the residual stream behind the part's layer, relative to the stream. The norms that
  read the stream divide by its length, so this is the share of noise in what all later layers see, and the divergence
  grows in proportion to it as long as it is small. Only one layer is in memory at a time, and all options together cost
  a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gm_mlx._mlx_lm import create_attention_mask
from gm_mlx.config import ModelConfig
from gm_mlx.decoder import Block
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.quant.build import build_model, rounded
from gm_mlx.quant.calibration import LAYERS, Sample, encode
from gm_mlx.quant.evaluate import Progress, answered, divergence, observe
from gm_mlx.quant.recipes import Q2, Q3, Q4, Q6, Q8, Precision, fitting, quantizable
from gm_mlx.router import Positions
from gm_mlx.tensors import Tensor
from gm_mlx.weights import runs_on_cpu

OPTIONS = (Q2, Q3, Q4, Q6, Q8)
FIXED = ("tower", "projector")  # no part of the decoder

Damage = dict[str, dict[int, float]]  # by part, then by bits


def parts(config: ModelConfig) -> dict[str, list[str]]:
    """Paths of the layers of each part, by names such as "layers.0.experts", "embeddings" and "head"."""
    found: dict[str, list[str]] = {}
    for path, layer in quantizable(config).items():
        if layer.component not in FIXED:
            name = "head" if path.endswith("lm_head") else layer.component
            if path.startswith(LAYERS):
                name = f"layers.{path.removeprefix(f'{LAYERS}.').partition('.')[0]}.{name}"
            found.setdefault(name, []).append(path)
    return found


def kl_damage(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    processor: Processor,
    samples: Sequence[Sample],
    progress: Progress | None = None,
) -> Damage:
    """Mean divergence of the answers, with one part rounded at a time."""
    model = build_model(config, tensors)
    cases = [answered(model, processor, sample) for sample in samples]
    features = [None if case.pixels is None else model.encode_images(case.pixels) for case in cases]
    mx.eval([array for array in features if array is not None])

    def log_probs() -> list[np.ndarray]:
        pairs = zip(cases, features, strict=True)
        return [observe(model, case, model.embed(case.ids, feature)).log_probs for case, feature in pairs]

    references = log_probs()
    modules = dict(model.named_modules())
    damage: Damage = {}
    found = parts(config)
    for done, (part, paths) in enumerate(found.items()):
        damage[part] = {}
        for option in OPTIONS:
            with _rounded([modules[path] for path in paths], option):
                pairs = zip(references, log_probs(), strict=True)
                damage[part][option.bits] = float(np.concatenate([divergence(a, b) for a, b in pairs]).mean())
        if progress is not None:
            progress("measure", done + 1, len(found))
    return damage


def layer_damage(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    processor: Processor,
    samples: Sequence[Sample],
    progress: Progress | None = None,
) -> Damage:
    """Relative squared error of the residual stream behind each part, with one layer in memory at a time."""
    found = parts(config)
    damage: Damage = {part: {} for part in found}
    # The head has no layer behind it, and gets the layers' share of progress.
    steps = config.text_config.num_hidden_layers + 1
    outer = Model(config)
    _load(outer, tensors, lambda name: not name.startswith(f"{LAYERS}."))
    streams, positions = [], []  # [1, L, D] per sample
    errors: dict[int, list[float]] = {option.bits: [] for option in OPTIONS}
    embedding = outer.language_model.model.embed_tokens
    for sample in samples:
        ids, pixels = encode(processor, sample)
        feature = None if pixels is None else outer.encode_images(pixels)
        streams.append(outer.embed(ids, feature))
        positions.append(outer.positions(ids))
        for option in OPTIONS:
            with _rounded([embedding], option):
                errors[option.bits].append(_error(streams[-1], outer.embed(ids, feature)))
    damage["embeddings"] = {bits: float(np.mean(values)) for bits, values in errors.items()}

    for layer in range(config.text_config.num_hidden_layers):
        prefix = f"{LAYERS}.{layer}."
        block = Block(config.text_config, layer)
        _load(block, tensors, lambda name, prefix=prefix: name.startswith(prefix), prefix)  # type: ignore[misc]
        modules = dict(block.named_modules())
        before = streams
        streams = [_through(block, x, where) for x, where in zip(before, positions, strict=True)]
        for part, paths in found.items():
            if paths[0].startswith(prefix):
                for option in OPTIONS:
                    with _rounded([modules[path.removeprefix(prefix)] for path in paths], option):
                        samples_seen = zip(before, streams, positions, strict=True)
                        values = [_error(y, _through(block, x, where)) for x, y, where in samples_seen]
                    damage[part][option.bits] = float(np.mean(values))
        if progress is not None:
            progress("measure", layer + 1, steps)

    # The head reads the last stream, and its error is relative to the logits; a tied one is the embeddings again.
    head, part = (embedding, "embeddings") if "head" not in found else (outer.language_model.lm_head, "head")
    last = [outer.language_model.model.norm(x[:, -1:]) for x in streams]
    logits = [_centred(outer.logits(x)) for x in last]
    for option in OPTIONS:
        with _rounded([head], option):
            values = [_error(y, _centred(outer.logits(x))) for x, y in zip(last, logits, strict=True)]
        damage[part][option.bits] = damage[part].get(option.bits, 0.0) + float(np.mean(values))
    if progress is not None:
        progress("measure", steps, steps)
    return damage


def _load(module: nn.Module, tensors: Mapping[str, Tensor], wanted: Callable[[str], bool], prefix: str = "") -> None:
    """Give a module the tensors that are wanted, by their names behind the prefix."""
    arrays = [(name.removeprefix(prefix), tensor.read()) for name, tensor in tensors.items() if wanted(name)]
    # MLX's CPU backend is fast in float32 only.
    module.load_weights([(n, a.astype(mx.float32) if runs_on_cpu() else a) for n, a in arrays], strict=False)
    module.eval()


def _through(block: Block, x: mx.array, positions: Positions) -> mx.array:
    y = block(x, create_attention_mask(x, None), positions=positions)
    mx.eval(y)
    return y


def _error(y: mx.array, other: mx.array) -> float:
    """Mean over positions of |y - other|^2 / |y|^2, of [1, L, D] and [1, L, D]."""
    y, other = y.astype(mx.float32), other.astype(mx.float32)
    share = mx.square(y - other).sum(axis=-1) / mx.maximum(mx.square(y).sum(axis=-1), 1e-12)
    return float(np.array(share.mean()))


def _centred(logits: mx.array) -> mx.array:
    """Logits without what is common to all of a row, which softmax does not see."""
    return logits - logits.mean(axis=-1, keepdims=True)


@contextmanager
def _rounded(layers: Sequence[nn.Module], option: Precision) -> Iterator[None]:
    """In here, the weights of some layers are as they come back from a precision that suits their rows."""
    kept = [layer.weight for layer in layers]
    for layer in layers:
        width = layer.weight.shape[-1]
        if precision := fitting(option, width):
            layer.weight = rounded(layer.weight, precision)
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight
