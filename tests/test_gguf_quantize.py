"""llama.cpp's quantizer: recipes as tensor types, importance, refusals, and what is left when it is stopped."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import raw_llama
from fixtures import picture, tiny_config, tiny_folder, tiny_model

from gm_mlx.config import ModelConfig
from gm_mlx.convert.to_gguf import quantize, types
from gm_mlx.convert.to_gguf.folder import gguf_pair
from gm_mlx.convert.to_gguf.imatrix import Entry, ImportanceMatrix, matrix_from_sums, read_imatrix, write_imatrix
from gm_mlx.convert.to_gguf.quantize import QuantizedFile, estimate_bytes, quantize_gguf
from gm_mlx.convert.to_gguf.types import FILE_TYPES, GGUF_PY_TYPES, Target, component_of, find_target
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder
from gm_mlx.gguf_file import GGUFHeader, read_header
from gm_mlx.inventory import model_layers
from gm_mlx.llama.binding import library
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.quant.importance import measure_importance
from gm_mlx.quant.recipes import RECIPES
from gm_mlx.quant.samples import Sample

RECIPE_TABLE = {name: recipe.precisions for name, recipe in RECIPES.items()}
USABLE = [name for name in RECIPES if name not in types.REFUSED]
# Rows of 256, which K-quants need.
WIDE = tiny_config(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
FILLERS = (
    "blk.0.",
    "blk.1.ffn_gate.",
    "blk.1.ffn_up.",
    "blk.1.ffn_down.",
    "blk.3.ffn_gate.",
    "blk.3.ffn_up.",
    "blk.3.ffn_down.",
)


def target(name: str) -> Target:
    return find_target(name, RECIPE_TABLE)


def write_plain(folder: Path, config: ModelConfig, file_type: str = "F16") -> Path:
    model = tiny_folder(folder / "model", model=tiny_model(config=config))
    pair = gguf_pair(config, read_model_folder(model), Processor.from_folder(model), name="tiny")
    write_gguf(folder / "plain.gguf", pair.text, target(file_type))
    return folder / "plain.gguf"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("narrow"), tiny_config(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def imatrix(plain: Path) -> ImportanceMatrix:
    folder = plain.parent / "model"
    samples = [Sample("What colour is the shape?", [picture(seed)]) for seed in range(4)]
    found = measure_importance(tiny_model(config=WIDE), Processor.from_folder(folder), samples)
    return matrix_from_sums(
        WIDE.text_config, found.sums, found.counts, dataset="noise", num_samples=4, num_tokens=found.num_tokens
    )


def matrices(header: GGUFHeader) -> dict[str, str]:
    """Types of the matrices that the model has, without the zeros that only fill llama.cpp's graph."""
    return {n: t.type for n, t in header.tensors.items() if component_of(n) and not n.startswith(FILLERS)}


def test_file_types_are_llama_cpps() -> None:
    for name, kind in FILE_TYPES.items():
        prefix = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert kind.number == gguf.LlamaFileType[prefix].value, name
        assert kind.number == getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}"), name
        assert kind.main in gguf.GGMLQuantizationType.__members__
    assert {name for name in FILE_TYPES if not target(name).needs_llama_cpp} == set(GGUF_PY_TYPES)
    assert [target(name).needs_llama_cpp for name in ("q8", "q4", "tiny")] == [False, True, True]


@pytest.mark.parametrize("name", USABLE)
def test_recipes_are_those_for_mlx(name: str) -> None:
    found, bits = target(name), {"Q3_K": 3, "Q4_K": 4, "MXFP4": 4, "Q8_0": 8, "Q4_0": 4, "F16": None}
    for component, precision in RECIPES[name].precisions.items():
        kind = found.components[component]
        assert bits[kind] == (precision and precision.bits), component
        assert (kind == "MXFP4") == (precision is not None and precision.mode == "mxfp4"), component
    assert set(found.vision_types().values()) <= set(GGUF_PY_TYPES)
    assert bits[found.vision_types()["tower"]] == bits[found.components["tower"]]
    # Every component that a recipe can name, and that the inventory has, is a matrix of one of the two files.
    known = {layer.component for layer in model_layers(PRESETS["llava-gm-2b"]) if layer.quantizable}
    assert known <= {*types.COMPONENTS, "tower", "projector"}


def test_names_are_found_or_refused() -> None:
    assert target("q4_k_m") == target("Q4_K_M") == target("Q4_K")
    assert target("q4").name == "q4"
    assert target("Q4_K_M").vision_types() == {"tower": "Q8_0", "projector": "F16"}
    assert target("BF16").vision_types() == {"tower": "BF16", "projector": "BF16"}
    assert target("tiny").vision_types() == {"tower": "F16", "projector": "F16"}
    for name, message in {
        "TQ1_0": "--quantize TQ1_0: not one of q4, q8",
        "mixed": "measured for MLX's formats",
        "awq": "`--quantize q4 --imatrix FILE`",
    }.items():
        with pytest.raises(UserError, match=message):
            target(name)


@pytest.mark.parametrize("name", USABLE)
def test_a_file_has_the_types_of_its_recipe(name: str, plain: Path, tmp_path: Path) -> None:
    done = quantize_gguf(plain, tmp_path / "out.gguf", target(name))
    header = read_header(tmp_path / "out.gguf")
    assert matrices(header) == {n: target(name).components[component_of(n) or ""] for n in matrices(header)}
    assert done.adjusted == {}
    check_whole(plain, header, done, name)
    raw_llama.logits(tmp_path / "out.gguf", [[1, 2, 3]])


def check_whole(plain: Path, header: GGUFHeader, done: QuantizedFile, name: str) -> None:
    """Nothing but types has changed."""
    before = read_header(plain)
    assert {n: t.shape for n, t in before.tensors.items()} == {n: t.shape for n, t in header.tensors.items()}
    new = {"gm.quantization": name, "general.file_type": target(name).file_type}
    assert {**before.metadata, **new, "general.quantization_version": 2} == header.metadata
    assert any(key.startswith("gm.") for key in before.metadata)
    floats = {n: t.type for n, t in before.tensors.items() if not component_of(n)}
    assert floats == {n: header.tensors[n].type for n in floats}
    assert done.num_bytes == header.path.stat().st_size
    assert sum(done.types.values()) == len(header.tensors)


@pytest.mark.parametrize("name", ["Q4_K_M", "Q2_K", "Q5_0", "MXFP4_MOE", "IQ4_XS", "F32"])
def test_a_file_type_is_what_llama_cpp_makes_of_it(name: str, plain: Path, tmp_path: Path) -> None:
    done = quantize_gguf(plain, tmp_path / "out.gguf", target(name))
    c = library()
    params = c.llama_model_quantize_default_params()
    params.ftype = target(name).file_type
    stock = tmp_path / "stock.gguf"
    assert c.llama_model_quantize(str(plain).encode(), str(stock).encode(), ctypes.byref(params)) == 0
    ours, theirs = read_header(tmp_path / "out.gguf"), read_header(stock)
    assert {n: t.type for n, t in ours.tensors.items()} == {n: t.type for n, t in theirs.tensors.items()}
    for tensor, other in zip(ours.tensors.values(), theirs.tensors.values(), strict=True):
        assert values(ours.path, tensor.offset, tensor.nbytes) == values(stock, other.offset, other.nbytes)
    check_whole(plain, ours, done, name)


def values(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_S", "Q4_0", "q3-experts"])
def test_importance_makes_the_error_smaller_where_it_counts(
    name: str, plain: Path, imatrix: ImportanceMatrix, tmp_path: Path
) -> None:
    without = quantize_gguf(plain, tmp_path / "without.gguf", target(name))
    weighted = quantize_gguf(plain, tmp_path / "with.gguf", target(name), imatrix=imatrix)
    assert without.unweighted == weighted.unweighted == []
    errors = [weighted_errors(plain, tmp_path / f"{which}.gguf", imatrix) for which in ("without", "with")]
    same = [n for n in errors[0] if errors[0][n][1] == errors[1][n][1] and errors[0][n][1] != "Q8_0"]
    assert len(same) > 10
    better = [n for n in same if errors[1][n][0] < errors[0][n][0]]
    assert len(better) >= 0.9 * len(same)
    assert sum(errors[1][n][0] for n in same) < 0.95 * sum(errors[0][n][0] for n in same)
    metadata = read_header(tmp_path / "with.gguf").metadata
    assert metadata["quantize.imatrix.dataset"] == "noise"
    assert metadata["quantize.imatrix.chunks_count"] == 4


def weighted_errors(plain: Path, path: Path, imatrix: ImportanceMatrix) -> dict[str, tuple[float, str]]:
    """By matrix: the sum of importance * error^2, as a share of that of the weights themselves, and the type."""
    out = {}
    truth = {tensor.name: tensor for tensor in gguf.GGUFReader(plain).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name
        if name not in imatrix.entries or name.startswith(FILLERS):
            continue
        x = truth[name].data.astype(np.float64)
        error = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - x
        experts = x.shape[0] if x.ndim == 3 else 1
        weight = imatrix.entries[name].weights.reshape(experts, 1, -1)
        shape = (experts, -1, x.shape[-1])
        share = (weight * error.reshape(shape) ** 2).sum() / (weight * x.reshape(shape) ** 2).sum()
        out[name] = share, tensor.tensor_type.name
    return out


def test_each_expert_has_an_importance_of_its_own(plain: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    name = "blk.1.ffn_up_exps.weight"
    data = {}
    for which in (None, 0, 3):
        entries = dict(imatrix.entries)
        if which is not None:  # the importance of one expert's channels, the other way round
            sums = entries[name].sums.copy()
            sums[which] = sums[which][::-1]
            entries[name] = entries[name]._replace(sums=sums)
        quantize_gguf(plain, tmp_path / "out.gguf", target("Q3_K_S"), imatrix=replace(imatrix, entries=entries))
        tensor = read_header(tmp_path / "out.gguf").tensors[name]
        raw = np.frombuffer(values(tmp_path / "out.gguf", tensor.offset, tensor.nbytes), np.uint8)
        data[which] = raw.reshape(4, -1)
    for which in (0, 3):
        assert [e for e in range(4) if not np.array_equal(data[which][e], data[None][e])] == [which]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "Q2_K_S"])
def test_types_that_need_importance(name: str, plain: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    # The file goes through its own format, as it does on the command line.
    write_imatrix(tmp_path / "i.gguf", imatrix)
    out = tmp_path / "out.gguf"
    quantize_gguf(plain, out, target(name), imatrix=read_imatrix(tmp_path / "i.gguf"))
    kinds = matrices(read_header(out))
    main = FILE_TYPES[name].main
    assert sum(kind == main for kind in kinds.values()) >= len(kinds) // 2
    assert np.isfinite(raw_llama.logits(out, [[1, 2, 3]])).all()


@pytest.mark.parametrize("name", [name for name, kind in FILE_TYPES.items() if kind.needs_imatrix])
def test_without_importance_they_are_refused(name: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--quantize {name}: needs an importance matrix; make one .*gm-mlx imatrix"):
        quantize_gguf(plain, tmp_path / "out.gguf", target(name))
    assert not any(tmp_path.iterdir())
    # llama.cpp itself refuses them too: the table lists neither too many nor too few.
    c = library()
    for each, kind in FILE_TYPES.items():
        if each in (name, "Q4_K_M", "IQ3_S"):
            params = c.llama_model_quantize_default_params()
            params.ftype = kind.number
            code = c.llama_model_quantize(str(plain).encode(), str(tmp_path / "o").encode(), ctypes.byref(params))
            assert bool(code) == kind.needs_imatrix, each


def test_an_importance_matrix_of_another_model_is_refused(
    plain: Path, narrow: Path, imatrix: ImportanceMatrix, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(UserError, match=r"'blk.*' has 256 values but the model's matrix has 64 input"):
        quantize_gguf(narrow, out, target("Q4_0"), imatrix=imatrix)
    strange = ImportanceMatrix(
        {"blk.99.attn_q.weight": Entry(np.ones((1, 256), np.float32), np.ones(1, int))}, name="x.gguf"
    )
    with pytest.raises(UserError, match=r"x\.gguf: says nothing about blk.1.attn_q.weight; it is of another model"):
        quantize_gguf(plain, out, target("Q4_0"), imatrix=strange)
    part = {name: entry for name, entry in imatrix.entries.items() if "blk.2.attn_q" not in name}
    done = quantize_gguf(plain, out, target("Q4_0"), imatrix=replace(imatrix, entries=part))
    assert done.notes() == ["the importance matrix says nothing about blk.2.attn_q.weight"]
    out.unlink()
    with pytest.raises(UserError, match=r"says nothing about blk\.2\.attn_q\.weight"):
        quantize_gguf(plain, out, target("Q2_K_S"), imatrix=replace(imatrix, entries=part))
    assert not any(tmp_path.iterdir())


def test_experts_that_no_token_reached_are_named(plain: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    entries = dict(imatrix.entries)
    for part in ("gate", "up", "down"):
        sums, counts = (array.copy() for array in entries[f"blk.3.ffn_{part}_exps.weight"])
        sums[1], counts[1] = 0, 0
        entries[f"blk.3.ffn_{part}_exps.weight"] = Entry(sums, counts)
    done = quantize_gguf(plain, tmp_path / "out.gguf", target("Q3_K_S"), imatrix=replace(imatrix, entries=entries))
    assert done.notes() == ["layer 2: no token that the importance matrix is from reached expert 1"]
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()


def test_rows_that_do_not_divide_are_told(narrow: Path, tmp_path: Path) -> None:
    done = quantize_gguf(narrow, tmp_path / "out.gguf", target("Q4_K_M"))
    header = read_header(tmp_path / "out.gguf")
    # All of them but those that only fill the graph.
    model = {n for n in matrices(header) if not n.startswith(("blk.1.ffn_gate.", "blk.1.ffn_up.", "blk.1.ffn_down."))}
    assert set(done.adjusted) == model
    assert header.tensors["blk.2.attn_q.weight"].type == "Q5_0"
    told = done.adjusted["blk.2.attn_q.weight"]
    assert told == "is Q5_0: its rows of 64 do not divide into blocks of 256, as Q4_K has"
    done = quantize_gguf(narrow, tmp_path / "out.gguf", target("q4"))
    assert {component_of(name) for name in done.adjusted} == {"experts", "dense_ffn"}
    assert quantize_gguf(narrow, tmp_path / "out.gguf", target("Q4_0")).adjusted == {}


def test_overrides_come_first(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize_gguf(plain, out, target("q4"), overrides={r"^blk\.1\.ffn_down_exps": "Q6_K", "attn_v": "F16"})
    kinds = matrices(read_header(out))
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q6_K"
    assert {kinds[f"blk.{i}.attn_v.weight"] for i in range(1, 5)} == {"F16"}
    assert kinds["blk.3.ffn_down_exps.weight"] == "Q4_K"
    with pytest.raises(UserError, match="'Q9' is no type of tensors"):
        quantize_gguf(plain, out, target("q4"), overrides={"attn_v": "Q9"})


def test_sources_that_cannot_be_quantized_are_refused(plain: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "out.gguf", tmp_path / "packed.gguf"
    with pytest.raises(UserError, match=r"none\.gguf: cannot be read"):
        quantize_gguf(tmp_path / "none.gguf", out, target("q4"))
    quantize_gguf(plain, packed, target("Q8_0"))
    with pytest.raises(UserError, match="is quantized already; start from a file in F16 or BF16"):
        quantize_gguf(packed, out, target("q4"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(plain.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut\.gguf: "):
        quantize_gguf(cut, out, target("q4"))
    strange = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(strange, "nonsense")
    writer.add_tensor("token_embd.weight", np.ones((8, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"--quantize q4: llama\.cpp cannot quantize it: .*nonsense") as error:
        quantize_gguf(strange, out, target("q4"))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "packed.gguf", "strange.gguf"]


def test_a_quantizer_that_crashes_is_one_line(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As an assertion in C does: it says something, and the process is gone.
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ggml.c:1: GGML_ASSERT(false) failed' >&2\nkill -ABRT $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(quantize.sys, "executable", str(script))
    with pytest.raises(UserError, match=r"quantizer stopped with code -6 \(ggml.c:1: GGML_ASSERT"):
        quantize_gguf(plain, tmp_path / "out.gguf", target("q4"))
    assert list(tmp_path.iterdir()) == [script]


def test_a_full_disk_is_one_line(plain: Path, tmp_path: Path) -> None:
    # A limit on the size of files, which this process' children have too, stands for a disk that has no more room.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"--quantize q4: the file cannot be written; the disk may be full"):
            quantize_gguf(plain, tmp_path / "out.gguf", target("q4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


def test_other_types_than_asked_for_are_noticed(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = read_header

    def lies(path: Path) -> Any:
        header = real(path)
        if "partial" not in str(path):
            return header
        wrong = replace(header.tensors["blk.1.ffn_up_exps.weight"], type="Q2_K")
        return replace(header, tensors={**header.tensors, "blk.1.ffn_up_exps.weight": wrong})

    monkeypatch.setattr(quantize, "read_header", lies)
    with pytest.raises(UserError, match=r"has written blk\.1\.ffn_up_exps\.weight in Q2_K and not in Q4_K"):
        quantize_gguf(plain, tmp_path / "out.gguf", target("q4"))
    assert not any(tmp_path.iterdir())


def test_progress_grows_to_the_end(plain: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    quantize_gguf(plain, tmp_path / "out.gguf", target("q4"), progress=lambda *values: told.append(values))
    total = sum(int(np.prod(tensor.shape)) for tensor in read_header(plain).tensors.values())
    assert len(told) > 50
    assert {(phase, whole) for phase, _, whole in told} == {("quantize", total)}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == total


def test_what_is_there_is_replaced_only_at_the_end(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def stop(phase: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(plain, out, target("q4"), progress=stop)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]
    quantize_gguf(plain, out, target("q4"))
    assert out.read_bytes()[:4] == b"GGUF"


CHILD = """
import sys
from pathlib import Path
from gm_mlx.convert.to_gguf.imatrix import read_imatrix
from gm_mlx.convert.to_gguf.quantize import quantize_gguf
from gm_mlx.convert.to_gguf.types import find_target

def progress(phase, done, total):
    print(done, flush=True)

plain, out, matrix = map(Path, sys.argv[1:])
quantize_gguf(plain, out, find_target("IQ1_S", {}), imatrix=read_imatrix(matrix), threads=1, progress=progress)
"""


def test_ctrl_c_leaves_nothing(plain: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    # IQ1_S takes a quarter of a minute: the interrupt comes in its midst.
    write_imatrix(tmp_path / "i.gguf", imatrix)
    place = tmp_path / "place"
    place.mkdir()
    arguments = [sys.executable, "-c", CHILD, str(plain), str(place / "out.gguf"), str(tmp_path / "i.gguf")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) == 0:
            pass
        assert [path.name.startswith(".out.gguf.partial-") for path in place.iterdir()] == [True]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait() != 0
    assert not any(place.iterdir())


def test_the_quantizer_dies_with_its_parent(plain: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    job = {"source": str(plain), "out": str(out), "file_type": FILE_TYPES["IQ1_S"].number, "threads": 1}
    weights = {name: entry.weights for name, entry in imatrix.entries.items()}
    job |= {"overrides": [], "keys": {}, "imatrix": [(name, values.size) for name, values in weights.items()]}
    command = [sys.executable, "-m", "gm_mlx.convert.to_gguf.quantizer_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(
            json.dumps(job).encode() + b"\n" + b"".join(values.tobytes() for values in weights.values())
        )
        process.stdin.flush()
        for _ in range(5):
            assert "tensor" in json.loads(process.stdout.readline())
        assert out.exists()
        process.stdin.close()  # what the system does for a process that is gone
        process.stdout.read()
        assert process.wait() == 1
    assert not out.exists()
    assert os.listdir(tmp_path) == []


def test_sizes_are_estimated_not_too_low(plain: Path, tmp_path: Path) -> None:
    header = read_header(plain)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    overhead = min(tensor.offset for tensor in header.tensors.values())
    for name in ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_L", "MXFP4_MOE", "F16", *USABLE):
        size = quantize_gguf(plain, tmp_path / "out.gguf", target(name)).num_bytes
        assert 0.97 < (estimate_bytes(shapes, target(name)) + overhead) / size < 1.35, name
