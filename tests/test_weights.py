"""Model folders: round trips, quantization tables, and every way in which files can be wrong."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fixtures import tiny_config, tiny_folder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from gm_mlx.config import MoEConfig
from gm_mlx.cpu.layers import FastQuantizedLinear
from gm_mlx.errors import UserError
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.safetensors_header import Entry, check_header
from gm_mlx.weights import (
    apply_quantization,
    load_model,
    named_arrays,
    num_parameters,
    quantizable_layers,
    save_model,
)

LAYER = "language_model.model.layers.0"
EXPERTS = f"{LAYER}.mlp.switch_mlp.up_proj"
QUERY = f"{LAYER}.self_attn.q_proj"
Q4 = {"group_size": 64, "bits": 4, "mode": "affine"}
Q8 = {"group_size": 32, "bits": 8, "mode": "affine"}


def same(one: Model, other: Model) -> bool:
    mine, theirs = named_arrays(one), named_arrays(other)
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and bool(mx.array_equal(mine[name], theirs[name])) for name in mine
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("moe", [None, MoEConfig(), MoEConfig(router_rank=3, use_residual=True)])
def test_what_is_saved_is_loaded(tmp_path: Path, kind: Any, moe: MoEConfig | None) -> None:
    model = tiny_model(config=tiny_config(kind, moe))
    save_model(model, tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert same(model, loaded)


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert files(tmp_path) == {"config.json", "model.safetensors.index.json", *shards}
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(array.nbytes for array in load_file(tmp_path / shard).values()) for shard in shards]
    single_tensors = [len(check_header(tmp_path / shard)) == 1 for shard in shards]
    assert all(size <= 100_000 or alone for size, alone in zip(sizes, single_tensors, strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same(model, load_model(tmp_path))


def test_a_save_leaves_no_file_of_the_model_before(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "model"  # made with the folders above it
    save_model(tiny_model(), folder, max_shard_bytes=100_000)
    (folder / "README.md").write_text("its card")
    second = tiny_model(1)
    save_model(second, folder)
    assert files(folder) == {"config.json", "model.safetensors"}
    save_model(second, folder, max_shard_bytes=100_000)
    assert "model.safetensors" not in files(folder)
    assert same(second, load_model(folder))


def test_nothing_but_a_model_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="holds something else than a model"):
        save_model(tiny_model(), tmp_path)
    assert files(tmp_path) == {"diary.txt"}


def test_a_processor_is_saved_with_the_model(tmp_path: Path) -> None:
    processor = Processor.from_folder(tiny_folder(tmp_path / "first"))
    save_model(tiny_model(1), tmp_path / "second", processor)
    assert Processor.from_folder(tmp_path / "second").to_dict() == processor.to_dict()
    assert files(tmp_path / "second") == files(tmp_path / "first")


def test_a_loaded_model_may_be_saved_over_itself(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path)
    save_model(load_model(tmp_path), tmp_path)
    assert same(model, load_model(tmp_path))


def test_an_interrupted_save_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_model()
    save_model(old, tmp_path, max_shard_bytes=100_000)
    before = files(tmp_path)
    real = mx.save_safetensors
    calls = []

    def stop_at_the_third(path: str, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(mx, "save_safetensors", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(1), tmp_path, max_shard_bytes=100_000)
    assert files(tmp_path) == before
    assert same(old, load_model(tmp_path))


def test_loading_reads_no_weights(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    mx.clear_cache()
    before = mx.get_active_memory()
    model = load_model(tmp_path)
    assert mx.get_active_memory() - before < 20_000
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > 500_000


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16, mx.float32])
def test_dtypes(tmp_path: Path, stored: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    apply_quantization(model, Q4, lambda path: path == EXPERTS)
    model.set_dtype(stored)
    save_model(model, tmp_path)
    gate = f"{LAYER}.mlp.gate.weight"

    on_cpu = named_arrays(load_model(tmp_path))
    assert on_cpu[f"{QUERY}.weight"].dtype == on_cpu[gate].dtype == mx.float32
    assert on_cpu[f"{EXPERTS}.scales"].dtype == on_cpu[f"{EXPERTS}.biases"].dtype == stored
    assert on_cpu[f"{EXPERTS}.weight"].dtype == mx.uint32

    chosen = named_arrays(load_model(tmp_path, dtype="float16"))
    assert chosen[f"{QUERY}.weight"].dtype == mx.float16
    assert chosen[f"{EXPERTS}.scales"].dtype == stored

    monkeypatch.setattr("gm_mlx.weights.runs_on_cpu", lambda: False)
    elsewhere = named_arrays(load_model(tmp_path))
    assert elsewhere[f"{QUERY}.weight"].dtype == stored
    assert elsewhere[gate].dtype == chosen[gate].dtype == mx.float32


def test_an_unknown_dtype(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    with pytest.raises(UserError, match=r"dtype: 'int4' is not one of"):
        load_model(tmp_path, dtype="int4")


# Quantization


def test_a_quantized_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    full = num_parameters(model)
    apply_quantization(model, Q4, lambda path: ".switch_mlp." in path)
    apply_quantization(model, {**Q8, QUERY: Q4}, lambda path: path.endswith(("embed_tokens", "lm_head")))
    save_model(model, tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert {key: table[key] for key in Q4} == Q4
    assert table["language_model.lm_head"] == Q8
    assert EXPERTS not in table  # the defaults say it
    loaded = load_model(tmp_path)
    assert same(model, loaded)
    assert loaded.config.extra["quantization"] == table
    assert num_parameters(loaded) == num_parameters(model) == full
    save_model(loaded, tmp_path / "again")
    assert same(model, load_model(tmp_path / "again"))


@pytest.mark.parametrize(
    "values",
    [Q4, Q8, {"group_size": 32, "bits": 4, "mode": "mxfp4"}, {"group_size": 16, "bits": 4, "mode": "nvfp4"}],
    ids=lambda values: f"{values['mode']}-{values['bits']}",
)
def test_modes(tmp_path: Path, values: dict[str, Any]) -> None:
    model = tiny_model()
    exact = model(mx.array([[5, 9, 300]]))
    apply_quantization(model, values, lambda path: path.startswith("language_model."))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    logits = loaded(mx.array([[5, 9, 300]]))
    assert mx.array_equal(logits, model(mx.array([[5, 9, 300]])))
    error = float(mx.linalg.norm(logits - exact) / mx.linalg.norm(exact))
    assert 0 < error < (0.05 if values["bits"] == 8 else 0.6)


def test_a_loaded_model_has_the_fast_layers_of_a_cpu(tmp_path: Path) -> None:
    model = tiny_model()
    apply_quantization(model, Q4, lambda path: path.startswith("language_model."))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.layers[0].self_attn.q_proj, FastQuantizedLinear)
    ids = mx.array([np.random.default_rng(0).integers(5, 400, 40).tolist()])
    np.testing.assert_allclose(np.array(loaded(ids)), np.array(model(ids)), atol=1e-4)
    save_model(loaded, tmp_path / "again")
    assert same(model, load_model(tmp_path / "again"))


def test_what_the_table_excludes_stays_as_it_is() -> None:
    model = tiny_model()
    apply_quantization(model, {**Q4, QUERY: False}, lambda path: path.startswith("language_model."))
    assert "scales" not in model.layers[0].self_attn.q_proj
    assert "scales" in model.layers[0].self_attn.k_proj
    assert model.config.extra["quantization"][QUERY] is False


def test_presets_do_not_share_a_quantization_table() -> None:
    config = tiny_config()
    apply_quantization(tiny_model(config=config), Q4, lambda path: path == QUERY)
    assert "quantization" not in config.extra


def test_neither_routers_nor_positions_can_be_quantized() -> None:
    names = quantizable_layers(tiny_model(config=tiny_config(moe=MoEConfig(router_rank=3))))
    assert EXPERTS in names and QUERY in names and "multi_modal_projector.linear_1" in names
    assert not any("gate" in name.split(".") or "position" in name or "norm" in name for name in names)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "quantization: not a table"),
        ({}, "quantization: needs group_size and bits"),
        ({**Q4, "mode": "int4"}, "quantization: mode 'int4' is not one of"),
        ({**Q4, "bits": 7}, "quantization: bits 7 is not one of"),
        ({**Q4, "bits": True}, "quantization: bits True is not one of"),
        ({**Q4, "group_size": 48}, "quantization: group_size 48 is not one of"),
        ({**Q4, QUERY: {"bits": 4}}, f"quantization: {QUERY}: needs group_size and bits"),
        ({**Q4, QUERY: {**Q4, "extra": 1}}, f"quantization: {QUERY}: needs group_size and bits"),
        ({**Q4, QUERY: "yes"}, f"quantization: {QUERY}: needs group_size and bits"),
        ({**Q4, f"{LAYER}.mlp.gate": Q4}, f"quantization: '{LAYER}.mlp.gate' is not a layer"),
        ({**Q4, "group_size": 128}, "quantization: .*: its rows of 64 do not divide into groups of 128"),
    ],
)
def test_tables_that_cannot_be_applied(tmp_path: Path, table: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_quantization(tiny_model(), table)
    if table != {**Q4, "group_size": 128}:  # nothing is quantized with the defaults here
        save_model(tiny_model(), tmp_path)
        edit(tmp_path / "config.json", lambda data: data.update(quantization=table))
        with pytest.raises(UserError, match=f"config.json: {message}"):
            load_model(tmp_path)


# Files that do not fit


def rewrite(path: Path, change: Any) -> None:
    arrays: dict[str, mx.array] = dict(mx.load(str(path)))  # type: ignore[arg-type]
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(path), arrays)


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop(NORM), rf"1 missing \({NORM}\)"),
        (lambda arrays: arrays.update(more=mx.zeros(3)), r"1 not part of the model \(more\)"),
        (lambda arrays: arrays.update({NORM: mx.zeros(65)}), rf"1 wrong \({NORM} is \[65\] instead of \[64\]\)"),
        (lambda arrays: arrays.update({NORM: mx.zeros(64, mx.int32)}), rf"1 wrong \({NORM} has dtype I32\)"),
        (
            lambda arrays: [arrays.pop(name) for name in list(arrays) if ".layers.1." in name],
            r"\d+ missing \(language_model\S+, language_model\S+, language_model\S+ and \d+ more\)",
        ),
        (
            lambda arrays: arrays.update({"a": mx.zeros(1), NORM: mx.zeros((8, 8))}),
            r"1 not part of the model \(a\); 1 wrong \(",
        ),
    ],
    ids=["missing", "extra", "misshaped", "dtype", "many", "several"],
)
def test_tensors_that_are_not_the_models_are_named(tmp_path: Path, change: Any, message: str) -> None:
    save_model(tiny_model(), tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)


def test_weights_of_a_quantized_layer_that_the_table_does_not_know(tmp_path: Path) -> None:
    model = tiny_model()
    apply_quantization(model, Q4, lambda path: path == QUERY)
    save_model(model, tmp_path)
    edit(tmp_path / "config.json", lambda data: data.pop("quantization"))
    with pytest.raises(UserError, match=rf"{QUERY}\.biases, {QUERY}\.scales.*1 wrong"):
        load_model(tmp_path)


def test_folders_that_lack_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: not found"):
        load_model(tmp_path)
    save_model(tiny_model(), tmp_path, max_shard_bytes=100_000)
    next(tmp_path.glob("model-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors: cannot be read \(No such file"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "..", "", 7])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: Any) -> None:
    save_model(tiny_model(), tmp_path, max_shard_bytes=100_000)
    edit(tmp_path / "model.safetensors.index.json", lambda data: data.update(weight_map={"x": name}))
    with pytest.raises(UserError, match=r"index\.json: .* is not a file name inside the model folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_damaged_indexes(tmp_path: Path, text: str) -> None:
    save_model(tiny_model(), tmp_path, max_shard_bytes=100_000)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json: not a safetensors index"):
        load_model(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path, max_shard_bytes=100_000)
    rewrite(next(tmp_path.glob("model-00001-of-*")), lambda arrays: arrays.update({NORM: mx.zeros(64)}))
    with pytest.raises(UserError, match=f"tensor '{NORM}' is in another shard too"):
        load_model(tmp_path)


# Headers

ARRAYS: dict[str, np.ndarray] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "none": np.zeros((0, 5), np.int32),
    "scalar": np.array(7, np.uint8),
    "words": np.arange(3, dtype=np.uint32),
}
VALID = save(ARRAYS, metadata={"format": "pt"})
HEADER = json.loads(VALID[8 : 8 + struct.unpack("<Q", VALID[:8])[0]])
DATA = VALID[8 + struct.unpack("<Q", VALID[:8])[0] :]


def packed(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_header_of_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    found = check_header(path)
    assert found["a"] == Entry("F32", (2, 3))
    assert found["scalar"] == Entry("U8", ())
    assert found.keys() == ARRAYS.keys()


def with_entry(name: str, **changes: Any) -> dict[str, Any]:
    return {**HEADER, name: {**HEADER[name], **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes and is not a safetensors file"),
        (b"1234567", "has 7 bytes and is not a safetensors file"),
        (b"PK\x03\x04 a zip archive, as torch.save writes", "is not a safetensors file"),
        (struct.pack("<Q", 2**63) + VALID[8:], "is not a safetensors file"),
        (VALID[:40], "is cut short: its header needs"),
        (VALID[:-1], "is cut short: its tensors need"),
        (VALID + b"x", "holds 1 bytes that belong to no tensor"),
        (packed(b"[]"), "is not a safetensors file"),
        (packed(b'{"a": '), "its header is not valid JSON"),
        (packed(b'{"a": NaN}'), "its header is not valid JSON"),
        (packed(b'{"a": ' + b"[" * 50_000), "its header is not valid JSON"),
        (packed(b'{"a": "\xff"}'), "'utf-8' codec"),
        (packed(b'{"\\ud800": {}}'), "text that is not Unicode"),
        (packed(b'{"a": {}, "a": {}}'), "names a key twice"),
        (packed({**HEADER, "__metadata__": {"n": 3}}), "__metadata__ is not a table of strings"),
        (packed({**HEADER, "a": 3}), "tensor 'a' has no description"),
        (packed(with_entry("a", dtype="F8_E5M2")), "tensor 'a' has dtype 'F8_E5M2'"),
        (packed(with_entry("a", dtype=["F32"])), "tensor 'a' has dtype"),
        (packed(with_entry("a", shape=[2, -3])), "tensor 'a' has no valid shape"),
        (packed(with_entry("a", shape=[2, 3.0])), "tensor 'a' has no valid shape"),
        (packed(with_entry("a", shape=[True, 6])), "tensor 'a' has no valid shape"),
        (packed(with_entry("none", shape=[0, 2**40])), "tensor 'none' has no valid shape"),
        (packed(with_entry("a", shape=[2, 4])), "tensor 'a' needs 32 bytes but its data_offsets hold 24"),
        (packed(with_entry("a", data_offsets=[0])), "tensor 'a' has no valid data_offsets"),
        (packed(with_entry("a", data_offsets=[10**30, 10**30 + 24])), "was due"),
        (packed({"a": HEADER["a"], "b": {**HEADER["a"]}}), "was due"),
    ],
    ids=range(26),
)
def test_damaged_files_are_told_apart(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        check_header(path)
    text = str(error.value)
    assert message in text
    assert text.startswith(f"{path}: ") and text.endswith("; fetch or convert the file again") and "\n" not in text


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        check_header(tmp_path)


ODD_VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 2**70, 1.5, float("nan"), "", "\ud800", [], [None], [[2, 3]], {}]
)
SHAPES = st.lists(st.integers(0, 8), max_size=3)
OFFSETS = st.lists(st.integers(0, len(DATA) + 4), min_size=2, max_size=2)
DTYPES = st.sampled_from(["F32", "F16", "I32", "U8", "U32", "F64", "Q4"])


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A sound file with a few changes: to values in its header, to bytes anywhere, or to its length."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(ARRAYS)))
        key, values = draw(
            st.sampled_from([("dtype", DTYPES), ("shape", SHAPES), ("data_offsets", OFFSETS), ("shape", ODD_VALUES)])
        )
        header[name][key] = draw(values)
    content = bytearray(packed(header))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@settings(max_examples=200)
@given(content=mutated_files())
def test_a_mutated_file_is_refused_or_read_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        entries = check_header(path)
    except UserError:
        return
    expected = load_file(path)
    loaded: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    assert entries.keys() == loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert entries[name].shape == loaded[name].shape == value.shape
        np.testing.assert_array_equal(np.array(loaded[name]), value)


def test_mutations_are_not_all_refused(tmp_path: Path) -> None:
    """The test above would prove nothing if no changed file ever passed."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(with_entry("a", shape=[6])))
    assert check_header(path)["a"].shape == (6,)
    path.write_bytes(packed(dict(reversed(HEADER.items()))))
    assert check_header(path).keys() == ARRAYS.keys()


def test_a_config_that_changed_after_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path)
    wider = replace(model.config, text_config=replace(model.config.text_config, intermediate_size=192))
    (tmp_path / "config.json").write_text(json.dumps(wider.to_dict()))
    with pytest.raises(UserError, match=r"6 wrong \(.* instead of"):
        load_model(tmp_path)
