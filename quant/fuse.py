"""Adapters merged into a model's folder, one tensor at a time: what ``gm-mlx fuse`` writes.

Only matrices that an adapter changes are unpacked, merged and packed again; all others are copied as they are. Packing
rounds what the adapters changed, so each merged matrix is held against its packed form on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from gm_mlx import __version__
from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder, write_model_folder
from gm_mlx.inventory import COMPONENTS
from gm_mlx.lora.config import Target, is_embedding, is_router, lora_targets
from gm_mlx.lora.folder import ADAPTER_FILE, Adapter, read_adapter
from gm_mlx.lora.merge import Change, merged, with_full_routers
from gm_mlx.lora.pairs import Pair
from gm_mlx.quant.build import rounded
from gm_mlx.quant.quantize import LICENCES, STALE, Source, open_source
from gm_mlx.quant.recipes import Precision
from gm_mlx.tensors import Tensor
from gm_mlx.weights import quantizable_layers, quantized_layers, unread_model


@dataclass
class Effect:
    """What merging did to the matrices of one component, in sums of squares that grow as they are written."""

    modules: int = 0
    whole: float = 0.0
    changed: float = 0.0
    lost: float = 0.0

    @property
    def change(self) -> float:
        """How far the adapters move the weights: |W' - W| / |W'|, with Frobenius norms over the component."""
        return math.sqrt(self.changed / self.whole) if self.whole else 0.0

    @property
    def rounding(self) -> float:
        """What packing the merged weights again adds: |Q(W') - W'| / |W'|."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


@dataclass
class Fused:
    """A model with adapters merged, not yet written.

    Attributes:
        source: the model, with nothing packed in it.
        config: the config, in which the merged layers are not quantized yet.
        tensors: merged ones as floats, others as they were.
        table: the quantization of the merged layers, or None.
        adapters: what was merged, for ``gm.json``.
        effects: by component; complete when all tensors have been read.
        dequantized: nothing will be packed any more.
    """

    source: Source
    config: ModelConfig
    tensors: dict[str, Tensor]
    table: dict[str, Any] | None
    adapters: list[dict[str, Any]]
    effects: dict[str, Effect] = field(default_factory=dict)
    dequantized: bool = False


def fuse_folders(folder: Path, adapters: Sequence[tuple[Path, float]], *, dequantize: bool = False) -> Fused:
    """Plan the merging of adapters into a model; nothing is read yet but names and shapes.

    Args:
        folder: the model's.
        adapters: folders of adapters, and how strong each shall be.
        dequantize: leave the whole model in floats; else merged layers are packed as they were.

    Raises:
        UserError: the model or an adapter is not sound, or one is not for the other.
    """
    source = open_source(folder, requantize=True)
    config, packed = ModelConfig.load(folder), read_model_folder(folder)
    layers = quantized_layers(unread_model(config, packed, folder))
    precisions = {path: Precision(layer.bits, layer.group_size, layer.mode) for path, layer in layers.items()}
    read = [(read_adapter(path), weight) for path, weight in adapters]
    for adapter, weight in read:
        if not math.isfinite(weight):
            raise UserError(f"{adapter.folder}: a weight of {weight} is not possible; 1 is as it was trained")
    changes: dict[str, list[tuple[Pair, float]]] = {}
    for adapter, weight in read:
        for path, pair in adapter.pairs(config).items():
            changes.setdefault(path, []).append((pair, weight))

    if dequantize:
        config, packed, precisions = source.config, source.tensors, {}
    fused = Fused(source, config, dict(packed), None, [_record(*one) for one in read], dequantized=dequantize)
    targets = lora_targets(config)
    if _has_low_rank_routers(config) and any(is_router(path) for path in changes):
        _make_routers_full(fused, targets)
    for path, pairs in changes.items():
        _replace(fused, targets[path], pairs, precisions.get(path))
    if again := {path: precisions[path].to_dict() for path in changes.keys() & precisions.keys()}:
        _plan_packing(fused, again, folder)
    return fused


def write_fused(
    fused: Fused,
    out: Path,
    name: str,
    *,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write the fused model's folder, or nothing; see ``write_model_folder`` for errors.

    Args:
        fused: what to write.
        out: the folder to be.
        name: what the base is called.
        force: replace a model folder that is there.
        progress: told ("write", bytes written, bytes in all).
    """
    folder = fused.source.folder
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    write_model_folder(
        out,
        fused.config,
        fused.tensors,
        processor=fused.source.processor,
        gm=_notes(fused),
        card=_card(old, name, fused),
        quantization=fused.table,
        force=force,
        extra_files={file.name: file.read_bytes() for pattern in LICENCES for file in sorted(folder.glob(pattern))},
        progress=progress,
    )


def ordered(effects: Mapping[str, Effect]) -> dict[str, Effect]:
    """Effects in the order in which components are always told."""
    return {component: effects[component] for component in COMPONENTS if component in effects}


def _replace(fused: Fused, target: Target, pairs: Sequence[tuple[Pair, float]], precision: Precision | None) -> None:
    """Put a merged tensor in the place of a matrix."""
    name = f"{target.path}.weight"
    # A router is float32 here as everywhere.
    base = fused.tensors[name] if precision is None else fused.source.tensors[name]
    for part in ("scales", "biases"):
        fused.tensors.pop(f"{target.path}.{part}", None)
    effect = fused.effects.setdefault(target.component, Effect())
    effect.modules += 1
    transposed = is_embedding(target.path)

    def read() -> mx.array:
        weight = base.read()
        arrays = [
            (pair.down.read(), pair.up.read(), None if pair.magnitude is None else pair.magnitude.read(), pair, power)
            for pair, power in pairs
        ]
        made = []
        for at in range(weight.shape[0]) if weight.ndim == 3 else [...]:
            before = weight[at].astype(mx.float32)
            changes = [
                Change(down[at], up[at], pair.strength, None if lengths is None else lengths[at], power)
                for down, up, lengths, pair, power in arrays
            ]
            after = merged(before.T, changes).T if transposed else merged(before, changes)
            made.append(after.astype(weight.dtype))
            _measure(effect, before, after, made[-1], precision)
            mx.eval(made)  # one matrix in float32 at a time
            if not mx.isfinite(made[-1]).all().item():
                raise UserError(f"{target.path}: merged, it is beyond what {base.dtype} can hold; use a smaller weight")
        return mx.stack(made) if weight.ndim == 3 else made[0]

    fused.tensors[name] = Tensor(base.dtype, base.shape, read)


def _measure(effect: Effect, before: mx.array, after: mx.array, stored: mx.array, precision: Precision | None) -> None:
    kept = stored if precision is None else rounded(stored, precision)
    effect.whole += _square(after)
    effect.changed += _square(after - before)
    effect.lost += _square(kept.astype(mx.float32) - after)


def _square(matrix: mx.array) -> float:
    return float(mx.square(matrix).sum())


def _has_low_rank_routers(config: ModelConfig) -> bool:
    moe = config.text_config.moe
    return moe is not None and moe.router_rank > 0


def _make_routers_full(fused: Fused, targets: Mapping[str, Target]) -> None:
    """Write all routers in full: a router and an adapter's change have no low rank together, and a model one form."""
    fused.config = with_full_routers(fused.config)
    for path, target in targets.items():
        if is_router(path):
            u, v = fused.tensors.pop(f"{path}.u"), fused.tensors.pop(f"{path}.v")
            fused.tensors[f"{path}.weight"] = Tensor("F32", target.shape, _product(u, v))


def _product(u: Tensor, v: Tensor) -> Callable[[], mx.array]:
    return lambda: (u.read().astype(mx.float32) @ v.read().astype(mx.float32)).T


def _plan_packing(fused: Fused, again: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Note which layers are to be packed, and as what: those of ``again``, and no other that is not packed yet."""
    table = fused.config.extra["quantization"]
    extra = {**fused.config.extra, "quantization": {**table, **dict.fromkeys(again, False)}}
    fused.config = dataclasses.replace(fused.config, extra=extra)
    floats = quantizable_layers(unread_model(fused.config, fused.tensors, folder))
    defaults = {key: table[key] for key in ("group_size", "bits", "mode") if key in table}
    fused.table = {**defaults, **dict.fromkeys(floats, False), **again}


def _record(adapter: Adapter, weight: float) -> dict[str, Any]:
    with open(adapter.folder / ADAPTER_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": adapter.folder.resolve().name, "weight": weight, "sha256": digest}


def _notes(fused: Fused) -> dict[str, Any]:
    """``gm.json``: the base's, without what merging makes untrue."""
    stale = STALE if fused.dequantized else [key for key in STALE if key != "quantization"]
    notes = {key: value for key, value in fused.source.notes.items() if key not in stale}
    return {**notes, "adapters": [*notes.get("adapters", []), *fused.adapters], "fused_by": f"gm-mlx {__version__}"}


def _card(old: str, name: str, fused: Fused) -> str:
    """The base's card, with a section that says what was merged."""
    what = ", ".join(f"`{one['name']}` with a weight of {one['weight']:g}" for one in fused.adapters)
    kept = old.rstrip() or f"# {name}"
    return f"{kept}\n\n## Adapters\n\nMerged into {name} by gm-mlx {__version__}: {what}.\n"
