"""An importance matrix in llama.cpp's file formats: per tensor, sums of x^2 over its input channels, and over how many.

The format is a GGUF file with two tensors for each matrix ``NAME`` of a model: ``NAME.in_sum2`` [E, C] and
``NAME.counts`` [E, 1], float32, where E counts the experts that are stacked in it, or is 1. llama.cpp's tools read what
is written here, and what ``llama-imatrix`` writes is read, in the old format too: a plain list of entries, each scaled
to what its file calls chunks. The format is defined in llama.cpp's tools/imatrix/imatrix.cpp and its readers in
common/imatrix-loader.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gm_mlx.config import TextConfig
from gm_mlx.convert.to_gguf.text import find_architecture
from gm_mlx.errors import UserError
from gm_mlx.files import new_file
from gm_mlx.gguf_file import MAGIC, MAX_NAME, GGUFHeader, read_header

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAKE = "make one with `gm-mlx imatrix MODEL -o FILE`"
MAX_BYTES = 4 << 30  # of a file; that of LLaVA-GM-7B has 20 MB


class Entry(NamedTuple):
    """What went into one matrix: sums of x^2, float32 [E, C], and the tokens of each expert, int64 [E]."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """How much each channel matters, float32 [E * C]: the mean of x^2 over an expert's own tokens.

        The channels of an expert without tokens matter alike, as llama-quantize has it. So do those of one that read
        nothing but zeros, where a quantizer would have nothing to go by.
        """
        means = self.sums / np.maximum(self.counts, 1)[:, None].astype(np.float32)
        return np.where(means.any(axis=1, keepdims=True), means, np.float32(1)).astype(np.float32).reshape(-1)


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix.

    Attributes:
        entries: by name of a matrix in the GGUF file.
        datasets: what it was measured on.
        chunk_count: how many pieces of text or prompts were read.
        chunk_size: their length in tokens, on average; 0 when the file does not say.
        name: the file, for error messages and for the metadata of what is quantized with it.
    """

    entries: dict[str, Entry]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 0
    name: str = ""

    def unseen_experts(self, first: int) -> dict[int, list[int]]:
        """Experts without a token, by layer of the model; ``first`` is the block of the file that is its layer 0."""
        found = {}
        for name, (_, counts) in sorted(self.entries.items()):
            experts = np.flatnonzero(counts == 0).tolist()
            if experts and (layer := re.match(r"blk\.(\d+)\.ffn_\w+_exps\.", name)):
                found[int(layer[1]) - first] = experts
        return dict(sorted(found.items()))


def matrix_from_sums(
    text: TextConfig,
    sums: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    *,
    dataset: str,
    num_samples: int,
    num_tokens: int,
) -> ImportanceMatrix:
    """What was measured on a model, for the GGUF file that is made of it.

    Constants that the file has multiplied into its matrices need no notice: all channels of a matrix' input are as many
    times as large, and only their ratios matter. The matrices of zeros in the file have entries without tokens.

    Args:
        text: the decoder's config.
        sums: by path of a linear of our model: sums of x^2, [E, C]; see ``gm_mlx.quant.importance``.
        counts: by path: tokens, [E].
        dataset: what was read.
        num_samples: how many prompts.
        num_tokens: how many tokens they had.

    Raises:
        UserError: the decoder cannot be written as GGUF.
    """
    arch = find_architecture(text)
    entries = {}
    for path, name in arch.matrix_names(text).items():
        entry = Entry(np.asarray(sums[path], np.float32), np.asarray(counts[path], np.int64))
        # A dense network may have been written as experts that are all alike.
        copies = text.moe.num_experts if text.moe and name.endswith("_exps.weight") and len(entry.counts) == 1 else 1
        entries[name] = Entry(*(np.repeat(each, copies, axis=0) for each in entry))
    for name, width in arch.zero_matrices(text):
        entries[name] = Entry(np.zeros((1, width), np.float32), np.zeros(1, np.int64))
    return ImportanceMatrix(entries, [dataset], num_samples, max(1, num_tokens // num_samples))


def check_imatrix_out(path: Path, *, force: bool = False) -> None:
    """Refuse a place for an importance matrix before it is measured.

    Raises:
        UserError: there is no such folder, or something is in the way that ``force`` does not replace.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}; make it first")
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the file to write, such as {path / 'imatrix.gguf'}")
    if path.exists():
        if not force:
            raise UserError(f"{path}: exists; choose another file, or replace it with --force")
        read_imatrix(path)  # a model is not replaced


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write the GGUF format, replacing the file when all of it is written.

    Raises:
        UserError: the file cannot be written.
    """
    from gguf import GGUFWriter

    try:
        with new_file(path) as partial:
            writer = GGUFWriter(partial, "imatrix")
            try:
                writer.add_type("imatrix")
                writer.add_array(DATASETS, matrix.datasets or [""])
                writer.add_uint32(CHUNKS, matrix.chunk_count)
                writer.add_uint32(CHUNK_SIZE, matrix.chunk_size)
                for name, (sums, counts) in sorted(matrix.entries.items()):
                    writer.add_tensor(name + SUMS, np.ascontiguousarray(sums, np.float32))
                    writer.add_tensor(name + COUNTS, counts.astype(np.float32)[:, None])
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); write elsewhere") from None


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in either format.

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for an importance matrix; {MAKE}")
        matrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {MAKE}") from None
    if not matrix.entries:
        raise UserError(f"{path}: an importance matrix without entries; {MAKE}")
    for name, (sums, counts) in matrix.entries.items():
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()):
            raise UserError(f"{path}: entry {name!r} has values that no sum of squares has; {MAKE}")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    if header.metadata.get("general.type", "imatrix") != "imatrix" or CHUNKS not in header.metadata:
        raise UserError(f"{path}: a GGUF file, but no importance matrix; {MAKE}")
    entries = {}
    for name in header.tensors:
        stem = name.removesuffix(SUMS).removesuffix(COUNTS)
        if name == stem or {stem + SUMS, stem + COUNTS} - set(header.tensors):
            raise UserError(f"{path}: tensor {name!r} is not one of a pair of sums and counts; {MAKE}")
        if name.endswith(SUMS):
            sums, counts = (_floats(header, stem + part) for part in (SUMS, COUNTS))
            whole = np.isfinite(counts).all() and np.array_equal(counts, np.round(counts)) and (counts < 2.0**62).all()
            if sums.size % counts.size or not whole:
                raise UserError(f"{path}: entry {stem!r}: {sums.size} sums do not belong to its counts; {MAKE}")
            entries[stem] = Entry(sums.reshape(counts.size, -1), counts.astype(np.int64))
    metadata = header.metadata
    datasets, chunks, size = metadata.get(DATASETS), metadata[CHUNKS], metadata.get(CHUNK_SIZE)
    if not isinstance(datasets, list) or not isinstance(chunks, int) or not isinstance(size, int):
        raise UserError(f"{path}: lacks {DATASETS}, {CHUNKS} or {CHUNK_SIZE}; {MAKE}")
    return ImportanceMatrix(entries, [str(text) for text in datasets], chunks, size, path.name)


def _floats(header: GGUFHeader, name: str) -> np.ndarray:
    tensor = header.tensors[name]
    if tensor.type != "F32":
        raise UserError(f"{header.path}: tensor {name!r} is {tensor.type}, not F32; {MAKE}")
    return np.fromfile(header.path, "<f4", tensor.nbytes // 4, offset=tensor.offset)


def _read_legacy(path: Path) -> ImportanceMatrix:
    """The format before GGUF: entries of a name, a number of calls, and the means of x^2 times that number.

    It does not say how many experts an entry is of; a quantizer sees that from the model.
    """
    data = path.read_bytes()
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise UserError(f"{path}: not an importance matrix, or damaged at byte {at}; {MAKE}")
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries: dict[str, Entry] = {}
    for _ in range(number()):
        length = number()
        name = take(length if length <= MAX_NAME else -1).decode("utf-8", errors="replace")
        calls, values = number(), number()
        if not name or name in entries or calls < 0 or values < 1:
            raise UserError(f"{path}: not an importance matrix, or damaged at byte {at}; {MAKE}")
        sums = np.frombuffer(take(4 * values), "<f4").reshape(1, -1)
        entries[name] = Entry(sums, np.array([calls], np.int64))
    chunks, datasets = 0, []
    if at < len(data):  # older ones end here
        chunks = number()
        datasets = [take(number()).decode("utf-8", errors="replace")]
    if at < len(data) or chunks < 0:
        raise UserError(f"{path}: not an importance matrix, or damaged at byte {at}; {MAKE}")
    return ImportanceMatrix(entries, datasets, chunks, 0, path.name)
