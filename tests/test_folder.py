"""Model folders written tensor by tensor: what is in them, what is in memory meanwhile, and what a crash leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import picture, tiny_config, tiny_folder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import gm_mlx
from gm_mlx import folder as folder_module
from gm_mlx import new_folder
from gm_mlx import tensors as tensors_module
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder, write_model_folder
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.safetensors_header import Entry, check_header
from gm_mlx.safetensors_writer import DTYPE_NAMES, MLX_DTYPES, bytes_of, write_safetensors
from gm_mlx.tensors import Tensor
from gm_mlx.weights import apply_quantization, load_model, named_arrays, quantizable_layers, save_model

LAYER = "language_model.model.layers.0"
EXPERTS = f"{LAYER}.mlp.switch_mlp.up_proj"
ROUTER = f"{LAYER}.mlp.gate.weight"
QUERY = f"{LAYER}.self_attn.q_proj"
Q4 = {"group_size": 32, "bits": 4, "mode": "affine"}
TABLES: dict[str, dict[str, Any]] = {
    "affine": {"group_size": 32, "bits": 4, EXPERTS: {"group_size": 64, "bits": 3}, QUERY: False},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4", EXPERTS: {"group_size": 32, "bits": 8}},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def tensors_of(model: Model) -> dict[str, Tensor]:
    arrays = named_arrays(model)
    return {n: Tensor(DTYPE_NAMES[a.dtype], a.shape, lambda a=a: a) for n, a in arrays.items()}  # type: ignore[misc]


def write(out: Path, model: Model | None = None, **options: Any) -> None:
    model = model or tiny_model()
    options = {"processor": None, "gm": {}, "card": "", **options}
    write_model_folder(out, options.pop("config", model.config), options.pop("tensors", tensors_of(model)), **options)


def same(one: Model, other: Model) -> bool:
    mine, theirs = named_arrays(one), named_arrays(other)
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and bool(mx.array_equal(mine[name], theirs[name])) for name in mine
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is written.


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("moe", [None, MoEConfig(), MoEConfig(router_rank=3, use_residual=True)])
def test_what_is_written_is_loaded(tmp_path: Path, kind: Any, moe: MoEConfig | None) -> None:
    model = tiny_model(config=tiny_config(kind, moe))
    write(tmp_path / "out", model)
    loaded = load_model(tmp_path / "out")
    assert loaded.config == model.config
    assert same(model, loaded)
    assert names(tmp_path) == {"out"}


def test_a_complete_folder_chats(tmp_path: Path) -> None:
    processor = Processor.from_folder(tiny_folder(tmp_path / "in"))
    write(
        tmp_path / "out",
        processor=processor,
        gm={"source": "here"},
        card="# A card\n",
        extra_files={"LICENSE.txt": b"text"},
        quantization={"group_size": 32, "bits": 8},
    )
    out = tmp_path / "out"
    assert names(out) == {
        *("config.json", "model.safetensors", "gm.json", "README.md", "LICENSE.txt"),
        *("processor_config.json", "chat_template.jinja", "tokenizer.model"),
    }
    gm = json.loads((out / "gm.json").read_text())
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert gm == {"source": "here", "sha256": {"model.safetensors": digest}}
    assert ((out / "README.md").read_text(), (out / "LICENSE.txt").read_bytes()) == ("# A card\n", b"text")
    with_images = [gm_mlx.load(str(f)).chat("What is this?", [picture()], max_tokens=8) for f in (out, tmp_path / "in")]
    assert with_images[0].text and with_images[0].stats.image_tokens == 4


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("block", [tensors_module.BLOCK_BYTES, 10_000])
def test_quantized_as_in_memory(
    tmp_path: Path, table: dict[str, Any], dtype: str | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the plain way: all in memory, cast, quantize, save."""
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", block)
    model = tiny_model()
    write(tmp_path / "streamed", model, quantization=table, dtype=dtype)
    if dtype:
        router = model.layers[0].mlp.gate.weight
        model.set_dtype(getattr(mx, dtype))
        model.layers[0].mlp.gate.weight = router
    apply_quantization(model, table)
    save_model(model, tmp_path / "whole")
    streamed, whole = (load_file_bits(tmp_path / name) for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys()
    for name, (dtype_name, content) in whole.items():
        assert streamed[name][0] == dtype_name, name
        assert np.array_equal(streamed[name][1], content), name
    assert (tmp_path / "streamed/config.json").read_text() == (tmp_path / "whole/config.json").read_text()


def load_file_bits(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    file = folder / "model.safetensors"
    loaded: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    return {
        name: (entry.dtype, np.frombuffer(bytes_of(loaded[name]), np.uint8))
        for name, entry in check_header(file).items()
    }


def test_dtypes(tmp_path: Path) -> None:
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    write(tmp_path / "kept", model)
    write(tmp_path / "cast", model, dtype="float16", quantization={**Q4, QUERY: False})
    kept, cast = (check_header(tmp_path / name / "model.safetensors") for name in ("kept", "cast"))
    assert {entry.dtype for name, entry in kept.items() if name != ROUTER} == {"BF16"}
    assert kept[ROUTER].dtype == cast[ROUTER].dtype == "F32"
    assert (cast[f"{QUERY}.weight"].dtype, cast[f"{EXPERTS}.weight"].dtype) == ("F16", "U32")
    assert cast[f"{EXPERTS}.scales"].dtype == cast[f"{EXPERTS}.biases"].dtype == "F16"


def test_what_is_quantized_is_copied_and_the_rest_may_be_quantized_later(tmp_path: Path) -> None:
    others = {path: False for path in quantizable_layers(tiny_model()) if path != EXPERTS}
    write(tmp_path / "first", quantization={**Q4, **others})
    config = ModelConfig.load(tmp_path / "first")
    tensors = read_model_folder(tmp_path / "first")
    write(tmp_path / "copy", config=config, tensors=tensors, dtype="float16")
    first, copy = check_header(tmp_path / "first/model.safetensors"), check_header(tmp_path / "copy/model.safetensors")
    assert copy[f"{EXPERTS}.scales"] == first[f"{EXPERTS}.scales"]  # codes were chosen for these very scales
    assert copy[f"{QUERY}.weight"].dtype == "F16"
    unnamed = {key: value for key, value in config.extra["quantization"].items() if value is not False}
    config = replace(config, extra={"quantization": unnamed})
    write(tmp_path / "more", config=config, tensors=tensors, quantization={"group_size": 32, "bits": 8})
    more = load_model(tmp_path / "more")
    layers = dict(more.named_modules())
    assert (layers[EXPERTS].bits, layers[QUERY].bits, layers[QUERY].group_size) == (4, 8, 32)
    assert mx.array_equal(layers[EXPERTS].weight, tensors[f"{EXPERTS}.weight"].read())


def test_shards(tmp_path: Path) -> None:
    model = tiny_model()
    write(tmp_path / "out", model, max_shard_bytes=100_000, quantization={"group_size": 32, "bits": 4})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    headers = {name: check_header(tmp_path / "out" / name) for name in shards}
    assert index["weight_map"] == {tensor: name for name, header in headers.items() for tensor in header}
    sizes = [sum(array.nbytes for array in load_file(tmp_path / "out" / name).values()) for name in shards]
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)
    hashes = json.loads((tmp_path / "out/gm.json").read_text())["sha256"]
    assert hashes == {name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in shards}
    apply_quantization(model, {"group_size": 32, "bits": 4})
    assert same(model, load_model(tmp_path / "out"))


def test_tensors_of_an_odd_size_come_last(tmp_path: Path) -> None:
    config = tiny_config()
    config = replace(config, vision_config=replace(config.vision_config, hidden_size=31 * 2, num_attention_heads=2))
    model = tiny_model(config=config)
    write(tmp_path / "out", model, dtype="float16")
    assert same(load_model(tmp_path / "out", dtype="float16"), half(model))
    sizes = [2 * int(np.prod(entry.shape)) for entry in check_header(tmp_path / "out/model.safetensors").values()]
    odd = [size % 8 != 0 for size in sizes]
    assert any(odd) and odd == sorted(odd)


def half(model: Model) -> Model:
    router = model.layers[0].mlp.gate.weight
    model.set_dtype(mx.float16)
    model.layers[0].mlp.gate.weight = router
    return model


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    write(tmp_path / "out", max_shard_bytes=100_000, progress=lambda *call: calls.append(call))
    total = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert {(phase, of) for phase, _, of in calls} == {("write", total)}
    done = [done for _, done, _ in calls]
    assert done == sorted(done) and done[-1] == total


def test_reading_a_folder(tmp_path: Path) -> None:
    model = tiny_model()
    write(tmp_path / "out", model, max_shard_bytes=100_000)
    tensors = read_model_folder(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: ("F32", array.shape) for name, array in named_arrays(model).items()
    }
    assert all(mx.array_equal(tensors[name].read(), array) for name, array in named_arrays(model).items())
    (tmp_path / "out/config.json").write_text(json.dumps(tiny_config(intermediate_size=192).to_dict()))
    with pytest.raises(UserError, match=r"out: the weights do not fit config.json: .* wrong \(.* instead of"):
        read_model_folder(tmp_path / "out")


def test_shapes_of_a_full_size_model_cost_no_memory() -> None:
    from gm_mlx.presets import PRESETS
    from gm_mlx.weights import unread_model

    config = PRESETS["llava-gm-7b"]
    shapes = {name: Entry("BF16", array.shape) for name, array in named_arrays(Model(config)).items()}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = unread_model(config, shapes, Path("here"))
    apply_quantization(model, {**Q4, "multi_modal_projector.linear_1": False})
    assert mx.get_peak_memory() - before < 1_000_000


# What is in memory.


@pytest.mark.parametrize("quantization", [None, {"group_size": 32, "bits": 4}])
def test_one_tensor_in_memory_at_a_time(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    """Whatever the number of tensors, the one before is gone when the next one is read."""
    alive: list[weakref.ref[mx.array]] = []
    most = 0

    def tracked(array: mx.array) -> mx.array:
        nonlocal most
        copy = array + 0
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(copy))
        return copy

    model = tiny_model(config=tiny_config(num_hidden_layers=6))
    tensors = {n: replace(t, read=lambda t=t: tracked(t.read())) for n, t in tensors_of(model).items()}  # type: ignore[misc]
    write(tmp_path / "out", model, tensors=tensors, quantization=quantization)
    assert len(alive) == len(tensors) > 50
    assert most == 0


@pytest.mark.parametrize("quantization", [None, {"group_size": 32, "bits": 4}])
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    """Three stacks of experts of 16 MB each follow each other."""
    config = tiny_config(num_hidden_layers=1, intermediate_size=16384)
    shapes = {name: array.shape for name, array in named_arrays(Model(config)).items()}
    tensors = {n: Tensor("F32", s, lambda s=s: mx.ones(s)) for n, s in shapes.items()}  # type: ignore[misc]
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write(tmp_path / "out", config=config, tensors=tensors, quantization=quantization)
    assert mx.get_peak_memory() - before < 1.7 * largest


def test_copies_of_one_matrix_are_not_made(tmp_path: Path) -> None:
    """Upcycled experts are one matrix that is seen several times."""
    config = tiny_config(num_hidden_layers=1, intermediate_size=16384)
    shapes = {name: array.shape for name, array in named_arrays(Model(config)).items()}
    tensors = {
        n: Tensor("F32", s, lambda s=s: mx.broadcast_to(mx.ones(s[1:]), s) if len(s) == 3 else mx.ones(s))  # type: ignore[misc]
        for n, s in shapes.items()
    }
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write(tmp_path / "out", config=config, tensors=tensors, quantization={"group_size": 32, "bits": 4})
    assert mx.get_peak_memory() - before < 3 * 4 * 16384 * 64  # one of the four experts, and what is made of it


def test_a_block_of_a_large_tensor_is_quantized_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 64 << 10)
    config = tiny_config(vocab_size=16384)
    model = tiny_model(config=config)
    large = "language_model.model.embed_tokens.weight"
    jobs = folder_module._plan(model, tensors_of(model), {**Q4, "bits": 8}, "float16")
    embedding = next(job for job in jobs if job.name == large)
    mx.eval(embedding.source.read())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seen = sum(piece.nbytes for piece in folder_module._data(embedding))
    assert seen == embedding.num_bytes
    # scales and biases wait for the end; the packed weight, a quarter of the tensor, never lies there as a whole
    assert mx.get_peak_memory() - before < embedding.num_bytes // 2


# What is refused.


def test_tensors_that_are_not_the_models(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = tensors_of(model)
    tensors["more.weight"] = tensors.pop(f"{QUERY}.weight")
    with pytest.raises(UserError, match=r"1 missing \(.*q_proj.weight\); 1 not part of the model \(more.weight\)"):
        write(tmp_path / "out", model, tensors=tensors)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype: 'int4' is not one of"),
        ({"quantization": {"group_size": 64, "bits": 9}}, "bits 9 is not one of"),
        ({"quantization": {"group_size": 128, "bits": 4}}, "do not divide into groups of 128"),
        ({"quantization": {**Q4, "nowhere": Q4}}, "'nowhere' is not a layer"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out", **options)
    assert names(tmp_path) == set()


def test_values_beyond_float16(tmp_path: Path) -> None:
    model = tiny_model()
    model.language_model.model.norm.weight = mx.full((64,), 1e5)
    write(tmp_path / "wide", model, dtype="bfloat16")
    with pytest.raises(UserError, match=r"'language_model.model.norm.weight' has values .* use --dtype bfloat16"):
        write(tmp_path / "out", model, dtype="float16")
    assert names(tmp_path) == {"wide"}


def test_a_tensor_that_is_not_what_it_said(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = tensors_of(model)
    tensors[ROUTER] = replace(tensors[ROUTER], read=lambda: mx.zeros((4, 63)))
    with pytest.raises(ValueError, match=r"mlp.gate.weight: read .*\(4, 63\)"):
        write(tmp_path / "out", model, tensors=tensors)
    assert names(tmp_path) == set()


def test_where_a_folder_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out, message in {
        "file": "is a file",
        "none/out": "there is no folder",
        "file/out": "there is no folder",
    }.items():
        with pytest.raises(UserError, match=f"{out}: {message}"):
            write(tmp_path / out, force=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out: exists; .* --force"):
        write(tmp_path / "out")
    write(tmp_path / "out", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine: holds something else than a model"):
        write(tmp_path / "mine", force=True)
    (tmp_path / "mine/config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="mine: holds something else than a model"):
        write(tmp_path / "mine", force=True)
    assert names(tmp_path / "mine") == {"thesis.tex", "config.json"}


@pytest.mark.parametrize(("out", "source"), [("a", "a"), ("a/b", "a"), ("a", "a/b"), ("link", "a")])
def test_source_and_out_in_each_other(tmp_path: Path, out: str, source: str) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(UserError, match="one lies in the other"):
        new_folder.check_out(tmp_path / out, force=True, sources=[tmp_path / source])
    assert new_folder.check_out(tmp_path / "c", sources=[tmp_path / source]) == (tmp_path / "c").resolve()


def test_a_link_to_a_model_keeps_being_one(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", tiny_model(1), force=True)
    assert (tmp_path / "link").is_symlink()
    assert same(load_model(tmp_path / "real"), tiny_model(1))


def test_too_small_a_disk_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]

    def read() -> mx.array:
        raise AssertionError

    tensors = {name: replace(tensor, read=read) for name, tensor in tensors_of(tiny_model()).items()}
    with pytest.raises(UserError, match=r"out: needs \d+ MB and its disk has 1 MB free"):
        write(tmp_path / "out", tensors=tensors)
    assert names(tmp_path) == set()


# What a failure leaves.


def test_an_interrupted_run_leaves_the_old_model(tmp_path: Path) -> None:
    write(tmp_path / "out")
    tensors = tensors_of(tiny_model(1))

    def interrupt() -> mx.array:
        assert len(names(tmp_path)) == 2  # the hidden folder is there
        raise KeyboardInterrupt

    tensors[f"{QUERY}.weight"] = replace(tensors[f"{QUERY}.weight"], read=interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", tensors=tensors, force=True)
    assert names(tmp_path) == {"out"}
    assert same(load_model(tmp_path / "out"), tiny_model())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "out: the disk is full"),
        (errno.EFBIG, "out: a file grew too large for its file system; use a smaller --max-shard-size"),
        (errno.EACCES, r"out: cannot be written \(Permission denied\)"),
    ],
)
def test_errors_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    write(tmp_path / "out")

    def fail(*args: Any) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_module, "write_safetensors", fail)
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out", force=True)
    assert names(tmp_path) == {"out"}
    assert same(load_model(tmp_path / "out"), tiny_model())


def test_a_failed_second_rename_brings_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "I/O error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="I/O error"):
        write(tmp_path / "out", tiny_model(1), force=True)
    assert names(tmp_path) == {"out"}
    assert same(load_model(tmp_path / "out"), tiny_model())


def test_another_program_makes_the_folder_meanwhile(tmp_path: Path) -> None:
    def read() -> mx.array:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/theirs").write_text("x")
        return mx.zeros((4, 64))

    tensors = tensors_of(tiny_model())
    tensors[ROUTER] = replace(tensors[ROUTER], read=read)
    with pytest.raises(UserError, match="out: was made by another program meanwhile"):
        write(tmp_path / "out", tensors=tensors)
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"theirs"}


# A program of its own, since it is killed: it writes another model over a folder, and waits at a given moment.
CHILD = """
import resource, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from fixtures import tiny_model
from gm_mlx.errors import UserError
from gm_mlx.folder import write_model_folder
from gm_mlx.tensors import Tensor
from gm_mlx.weights import named_arrays

def wait():
    print("now", flush=True)
    time.sleep(60)

def progress(phase, done, total):
    if moment == "write" and done > total // 2:
        wait()

def rename(self, target):
    real(self, target)
    if moment == "between":
        wait()

out, moment = Path(sys.argv[1]), sys.argv[2]
real, Path.rename = Path.rename, rename
if moment == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
model = tiny_model(1)
tensors = {{n: Tensor("F32", a.shape, lambda a=a: a) for n, a in named_arrays(model).items()}}
try:
    write_model_folder(out, model.config, tensors, processor=None, gm={{}}, card="", force=True, progress=progress)
except UserError as error:
    print(error)
"""


def child(out: Path, moment: str) -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(out), moment], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "left"), [("write", {"out", ".out.partial-"}), ("between", {".out.partial-", ".out.old-"})]
)
def test_kill_9(tmp_path: Path, moment: str, left: set[str]) -> None:
    write(tmp_path / "out")
    writer = child(tmp_path / "out", moment)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "now\n"
    # Another run may come while this one is at work, and must leave it alone.
    new_folder._recover(tmp_path / "out")
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert {name.rstrip("0123456789") for name in names(tmp_path)} == left
    if moment == "write":
        assert same(load_model(tmp_path / "out"), tiny_model())
    with pytest.raises(UserError, match="out: exists"):  # also where the old model had to be brought back
        write(tmp_path / "out", tiny_model(2))
    assert names(tmp_path) == {"out"}
    assert same(load_model(tmp_path / "out"), tiny_model())
    write(tmp_path / "out", tiny_model(2), force=True)
    assert same(load_model(tmp_path / "out"), tiny_model(2))


@pytest.mark.slow
def test_a_file_that_grows_too_large_for_its_file_system(tmp_path: Path) -> None:
    """The system's own limit, in a program of its own: it holds for the whole process."""
    write(tmp_path / "out")
    said, _ = child(tmp_path / "out", "limit").communicate()
    assert "out: a file grew too large for its file system" in said
    assert names(tmp_path) == {"out"}
    assert same(load_model(tmp_path / "out"), tiny_model())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        small = tiny_model(config=tiny_config(intermediate_size=64))
        monkeypatch.setattr(new_folder, "check_space", lambda *_: None)
        monkeypatch.setattr(folder_module, "check_space", lambda *_: None)
        write(disk / "out", small, quantization=Q4)
        with pytest.raises(UserError, match="out: the disk is full"):
            write(disk / "out", force=True)
        assert names(disk) == {"out"}
        assert load_model(disk / "out").config.text_config.intermediate_size == 64
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# The writer by itself.


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        st.tuples(st.sampled_from(["U8", "F16", "BF16", "F32"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_a_written_file_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, kinds: Mapping[str, Any]) -> None:
    path = tmp_path_factory.mktemp("writer") / "x.safetensors"
    kinds = {name: kind for name, kind in kinds.items() if name != "__metadata__"}
    arrays = {
        name: mx.array(np.random.default_rng(0).integers(0, 100, shape)).astype(MLX_DTYPES[dtype])
        for name, (dtype, shape) in kinds.items()
    }
    entries = {name: Entry(dtype, tuple(shape)) for name, (dtype, shape) in kinds.items()}
    digest = write_safetensors(path, entries, map(bytes_of, arrays.values()))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert check_header(path) == entries
    loaded: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    assert all(mx.array_equal(loaded[name], arrays[name]) for name in arrays)


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    for number, data in enumerate([b"123", b"12345"]):
        with pytest.raises(ValueError, match="where 4 were announced"):
            write_safetensors(tmp_path / str(number), {"a": Entry("U8", (4,))}, [memoryview(data)])
