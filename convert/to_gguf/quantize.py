"""From a plain GGUF file to a quantized one, by llama.cpp's own quantizer.

The result is made beside its place, by a process that dies with this one or with Ctrl-C, and it is checked before it
gets its name: every tensor is there, has the type that the target names, and every key is as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gm_mlx.convert.to_gguf.imatrix import ImportanceMatrix
from gm_mlx.convert.to_gguf.types import (
    COMPONENTS,
    FLOAT_TYPES,
    GGML_TYPES,
    NUMBERS,
    Target,
    component_of,
    fits,
    require_imatrix,
)
from gm_mlx.errors import UserError
from gm_mlx.files import new_file
from gm_mlx.gguf_file import GGUFHeader, read_header
from gm_mlx.llama.binding import library
from gm_mlx.llama.model import physical_cores

QUANTIZATION, FILE_TYPE = "gm.quantization", "general.file_type"
ADDED_LAYER = "blk.0.layer_output_scale.weight"  # where it is, the model's layer 0 is block 1; see ``gemma4``


@dataclass(frozen=True)
class QuantizedFile:
    """What became of a file.

    Attributes:
        target: its name.
        num_bytes: its size.
        types: how many tensors have each type.
        adjusted: by name of a tensor whose rows do not divide into the target's blocks: what it is instead.
        unweighted: matrices that the importance matrix says nothing about, among those it could.
        unseen: experts without a token in it, by layer of the model.
    """

    target: str
    num_bytes: int
    types: dict[str, int]
    adjusted: dict[str, str]
    unweighted: list[str]
    unseen: dict[int, list[int]]

    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        lines = [f"{name} {what}" for name, what in self.adjusted.items()]
        if self.unweighted:
            few = ", ".join(self.unweighted[:3]) + (" and more" if len(self.unweighted) > 3 else "")
            lines.append(f"the importance matrix says nothing about {few}")
        for layer, experts in self.unseen.items():
            listed = ", ".join(map(str, experts))
            lines.append(f"layer {layer}: no token that the importance matrix is from reached expert {listed}")
        return lines


def check_quantizer(target: Target, with_imatrix: bool) -> None:
    """Refuse a target that cannot be made here, before work is put into a plain file.

    Raises:
        UserError: llama-cpp-python is not installed or lacks something, or the target needs an importance matrix.
    """
    require_imatrix(target, with_imatrix)
    library()


def quantize_gguf(
    source: Path,
    out: Path,
    target: Target,
    *,
    imatrix: ImportanceMatrix | None = None,
    overrides: Mapping[str, str] | None = None,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuantizedFile:
    """Quantize a text model's GGUF file with llama.cpp.

    Args:
        source: a file of F32, F16 and BF16 tensors, as ``write`` makes it.
        out: the file to be; one that is there is replaced at the end.
        target: from ``find_target``.
        imatrix: how much each input channel matters. Without one all matter alike.
        overrides: types by pattern of tensor names, before the target's own; the first that is found counts.
        threads: of the quantizer; 0 for all cores.
        progress: told ("quantize", weights done, weights).

    Raises:
        UserError: llama-cpp-python is not installed, ``source`` is no such file, the importance matrix is missing or of
            another model, or the quantizer fails. Nothing is left behind, whatever the exception.
    """
    check_quantizer(target, imatrix is not None)
    header = read_header(source)
    wanted = {
        **(overrides or {}),
        **{COMPONENTS[part]: kind for part, kind in target.components.items() if part in COMPONENTS},
    }
    if unknown := [kind for kind in wanted.values() if kind not in NUMBERS]:
        raise UserError(f"--quantize {target.name}: {unknown[0]!r} is no type of tensors; use one such as Q4_K or Q8_0")
    packed = [name for name, tensor in header.tensors.items() if tensor.type not in FLOAT_TYPES]
    if packed:
        raise UserError(f"{source}: {packed[0]} is quantized already; start from a file in F16 or BF16")
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    weights, unweighted = imatrix_weights(shapes, target, imatrix)
    keys = _keys(target, imatrix)
    try:
        with new_file(out) as partial:
            job = {
                "source": str(source),
                "out": str(partial),
                "file_type": target.file_type,
                "threads": threads or physical_cores(),
                "overrides": [(pattern, NUMBERS[kind]) for pattern, kind in wanted.items()],
                "imatrix": [(name, values.size) for name, values in weights.items()],
                "keys": keys,
            }
            _run(f"--quantize {target.name}", job, weights, header, progress)
            made = read_header(partial)
            _check(header, made, target, wanted)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); write elsewhere") from None
    return QuantizedFile(
        target=target.name,
        num_bytes=out.stat().st_size,
        types=dict(Counter(tensor.type for tensor in made.tensors.values())),
        adjusted=_adjusted(header, made, target, wanted),
        unweighted=unweighted,
        unseen=imatrix.unseen_experts(first=int(ADDED_LAYER in header.tensors)) if imatrix is not None else {},
    )


def estimate_bytes(shapes: Mapping[str, tuple[int, ...]], target: Target) -> int:
    """About how many bytes a file takes whose tensors have these shapes; rather too many.

    A file type's own rules give some tensors more bits than most have: a fifth is added for them.
    """
    sizes = {name: (block, width) for name, block, width in GGML_TYPES.values()}
    total = 0.0
    for name, shape in shapes.items():
        component = component_of(name)
        kind = target.tensor_type(name) if component else "F32"
        if component == "embeddings" and not target.components and kind not in FLOAT_TYPES:
            kind = "Q8_0"
        if not fits(kind, shape[-1]):
            kind = "F16"
        block, width = sizes[kind]
        spare = 1.2 if component and not target.components and kind not in (*FLOAT_TYPES, "Q8_0") else 1
        total += math.prod(shape) / block * width * spare
    return int(total)


def _keys(target: Target, imatrix: ImportanceMatrix | None) -> dict[str, str | int]:
    """What is added to the metadata; of an importance matrix, what llama-quantize notes too."""
    keys: dict[str, str | int] = {QUANTIZATION: target.name}
    if imatrix is not None:
        keys["quantize.imatrix.file"] = imatrix.name
        if imatrix.datasets:
            keys["quantize.imatrix.dataset"] = imatrix.datasets[0]
        keys["quantize.imatrix.entries_count"] = len(imatrix.entries)
        keys["quantize.imatrix.chunks_count"] = imatrix.chunk_count
    return keys


def imatrix_weights(
    shapes: Mapping[str, tuple[int, ...]], target: Target, imatrix: ImportanceMatrix | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What the quantizer is told of each matrix, float32 [E * C], and the matrices of which nothing is known.

    Args:
        shapes: of the file's tensors, by name.
        target: what is to be made.
        imatrix: the importance matrix; without one, all is empty.

    Raises:
        UserError: it is of another model, or lacks what the target cannot do without.
    """
    if imatrix is None:
        return {}, []
    weights: dict[str, np.ndarray] = {}
    unknown: list[str] = []
    known = False
    where = imatrix.name or "the importance matrix"
    for name, shape in shapes.items():
        component, size = component_of(name), math.prod(shape[:-2]) * shape[-1]
        if component and name in imatrix.entries:
            weights[name] = imatrix.entries[name].weights
            known |= not _is_filler(name, shapes)
            if weights[name].size != size:
                raise UserError(
                    f"{where}: entry {name!r} has {weights[name].size} values but the model's matrix has {size} input "
                    "channels; it is of another model: make one with `gm-mlx imatrix MODEL -o FILE`"
                )
        elif component and component != "embeddings":
            if _is_filler(name, shapes):
                weights[name] = np.ones(size, np.float32)
            else:
                unknown.append(name)
    if not known or (unknown and target.needs_imatrix):
        raise UserError(
            f"{where}: says nothing about {(unknown or ['this model'])[0]}; it is of another model, or not complete: "
            "make one with `gm-mlx imatrix MODEL -o FILE`"
        )
    return weights, unknown


def _is_filler(name: str, names: Container[str]) -> bool:
    """Whether a matrix is one of the zeros that llama.cpp's graph needs and the model has not.

    See ``gemma4``, whose first layer scales the stream, and ``step35``, whose last layer has no network.
    """
    if ADDED_LAYER in names:
        beside = re.sub(r"(ffn_gate|ffn_up|ffn_down)\.weight$", r"\1_exps.weight", name)
        return name.startswith("blk.0.") or (beside != name and beside in names)
    last = next((i for i in count() if f"blk.{i}.ffn_norm.weight" not in names), 0) - 1
    if any(f"blk.{last}.ffn_down{suffix}.weight" in names for suffix in ("", "_exps")):
        return False
    return name.startswith(f"blk.{last}.") or "_shexp." in name


def _run(
    what: str,
    job: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    header: GGUFHeader,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Let the quantizer's process do its work; it is gone when this returns or raises."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items()}
    total, done, current = sum(sizes.values()), 0, 0
    outcome: dict[str, str | None] = {}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gm_mlx.convert.to_gguf.quantizer_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C in the terminal is for this process, which ends that one
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; why is seen below
                process.stdin.write(json.dumps(job).encode() + b"\n")
                for values in weights.values():
                    process.stdin.write(values.tobytes())
                process.stdin.flush()
            for line in process.stdout:
                message = json.loads(line)
                if "failed" in message:
                    outcome = message
                elif progress is not None:
                    done, current = done + current, sizes.get(message["tensor"], 0)
                    progress("quantize", done, total)
            process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if outcome.get("failed", "") is not None:
            complaints.seek(0)
            said = complaints.read().decode("utf-8", errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{what}: {_reason(outcome.get('failed'), process.returncode, *said)}")
    if progress is not None:
        progress("quantize", total, total)


def _reason(failed: str | None, code: int, said: str = "") -> str:
    """Why the quantizer's process failed, in a line."""
    if failed is None:
        where = f" ({said.strip()})" if said else ""
        return f"llama.cpp's quantizer stopped with code {code}{where}; there may be too little memory"
    if "iostream" in failed or "ios_base" in failed:
        return "the file cannot be written; the disk may be full"
    return f"llama.cpp cannot quantize it: {failed}"


def _check(header: GGUFHeader, made: GGUFHeader, target: Target, wanted: Mapping[str, str]) -> None:
    """Refuse a result that is not what was asked for; a llama.cpp whose rules have changed may make one."""
    strange = [
        f"{name} in {tensor.type} and not in {kind}"
        for name, tensor in made.tensors.items()
        if (kind := _asked(name, wanted))
        and component_of(name)
        and fits(kind, tensor.shape[-1])
        and tensor.type != kind
    ]
    shapes, before = ({name: tensor.shape for name, tensor in h.tensors.items()} for h in (made, header))
    strange += [] if shapes == before else ["other tensors than there were"]
    metadata = {**header.metadata, QUANTIZATION: target.name, FILE_TYPE: target.file_type}
    strange += [f"another value of {key}" for key in metadata if made.metadata.get(key) != metadata[key]]
    if strange:
        raise UserError(f"llama.cpp's quantizer has written {strange[0]}; try another version of llama-cpp-python")


def _asked(name: str, wanted: Mapping[str, str]) -> str | None:
    """The type that a pattern names for a tensor, if one does."""
    return next((kind for pattern, kind in wanted.items() if re.search(pattern, name)), None)


def _adjusted(header: GGUFHeader, made: GGUFHeader, target: Target, wanted: Mapping[str, str]) -> dict[str, str]:
    """What became of matrices whose rows do not divide into blocks; the zeros that fill the graph do not count."""
    found = {}
    for name, tensor in made.tensors.items():
        kind, width = _asked(name, wanted) or target.main, tensor.shape[-1]
        if component_of(name) and not fits(kind, width) and not _is_filler(name, header.tensors):
            block = next(block for other, block, _ in GGML_TYPES.values() if other == kind)
            found[name] = f"is {tensor.type}: its rows of {width} do not divide into blocks of {block}, as {kind} has"
    return found
