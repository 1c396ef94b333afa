"""Importance matrices: what is measured against float64 and llama.cpp itself, and the files they are kept in."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy_decoder
import pytest
import raw_llama
from fixtures import IMAGE_TOKEN, picture, tiny_config, tiny_folder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_products import Products, watched

from gm_mlx import cpu
from gm_mlx.cli.main import main
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.convert.to_gguf.folder import gguf_pair
from gm_mlx.convert.to_gguf.imatrix import (
    Entry,
    ImportanceMatrix,
    matrix_from_sums,
    read_imatrix,
    write_imatrix,
)
from gm_mlx.convert.to_gguf.text import find_architecture, first_block, matrix_names
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.errors import UserError
from gm_mlx.folder import read_model_folder
from gm_mlx.model import Model
from gm_mlx.processor import Processor
from gm_mlx.quant.calibration import LAYERS, Tap
from gm_mlx.quant.importance import Importance, measure_importance
from gm_mlx.quant.recipes import recipe_table
from gm_mlx.quant.samples import Sample, encode
from gm_mlx.weights import apply_quantization, named_arrays

SAMPLES = [
    Sample("What colour is the shape?", [picture(0)]),
    Sample("Hello world, how many small blue squares are there in the two pictures?", [picture(1), picture(2)]),
    Sample("Hello"),
    Sample("The quick brown fox jumps over the lazy dog. " * 3, [picture(3)]),
]
CONFIGS: dict[str, ModelConfig] = {
    "sparse and dense": tiny_config(num_key_value_heads=2, tie_word_embeddings=True),
    "all sparse, one expert each, low-rank": tiny_config(moe=MoEConfig(mode="dense", top_k=1, router_rank=2)),
    "dense": tiny_config(moe=None, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_measured_is_what_float64_says(name: str, processor: Processor) -> None:
    model = tiny_model(config=CONFIGS[name])
    found = measure_importance(model, processor, SAMPLES)
    expected = Importance()
    for sample in SAMPLES:
        for path, rows, experts in inputs(model, *encode(processor, sample)):
            size = experts.max(initial=-1) + 1 if "switch_mlp" not in path else model.config.text_config.moe.num_experts
            sums = np.stack([np.square(rows[experts == e]).sum(axis=0) for e in range(size)])
            expected.add([path], sums, np.bincount(experts, minlength=size))
    assert set(found.sums) == set(expected.sums) == set(matrix_names(model.config.text_config))
    for path, sums in expected.sums.items():
        assert found.counts[path].tolist() == expected.counts[path].tolist(), path
        np.testing.assert_allclose(found.sums[path], sums, rtol=2e-4, atol=1e-4 * sums.mean(), err_msg=path)
    assert found.num_samples == len(SAMPLES)
    assert found.num_tokens == found.counts[f"{LAYERS}.0.self_attn.q_proj"].item()


def inputs(model: Model, ids: np.ndarray, pixels: mx.array | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What each linear of the decoder reads, [N, C] in float64, and each row's expert, [N]."""
    text = model.config.text_config
    w = {name: np.asarray(array, np.float64) for name, array in named_arrays(model).items()}
    x = numpy_decoder.token_embeddings(text, w, np.where(ids[0] == IMAGE_TOKEN, 0, ids[0]).tolist())
    if pixels is not None:
        x[ids[0] == IMAGE_TOKEN] = np.asarray(model.encode_images(pixels), np.float64).reshape(-1, text.hidden_size)
    one = np.zeros(len(x), int)
    gelu = numpy_decoder.tanh_gelu
    for i in range(text.num_hidden_layers):
        layer = f"{LAYERS}.{i}"
        h = numpy_decoder._norm(text, x, w[f"{layer}.input_layernorm.weight"])
        yield from ((f"{layer}.self_attn.{part}_proj", h, one) for part in "qkv")
        # With the identity in the place of the last matrix, attention returns what that would have read.
        size = text.num_attention_heads * text.head_dim
        bare = {**w, f"{layer}.self_attn.o_proj.weight": np.eye(size)}
        heads = numpy_decoder._attention(text, bare, f"{layer}.self_attn", h, lambda values: values)
        yield f"{layer}.self_attn.o_proj", heads, one
        x = x + heads @ w[f"{layer}.self_attn.o_proj.weight"].T
        h = numpy_decoder._norm(text, x, w[f"{layer}.post_attention_layernorm.weight"])
        if i not in text.sparse_layers:
            gate, up, down = (w[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            between = gelu(h @ gate.T) * (h @ up.T)
            yield from (
                (f"{layer}.mlp.{part}", rows, one)
                for part, rows in (("gate_proj", h), ("up_proj", h), ("down_proj", between))
            )
            x = x + between @ down.T
            continue
        assert text.moe is not None
        path = f"{layer}.mlp.switch_mlp"
        router = w.get(f"{layer}.mlp.gate.weight")
        scores = h @ (router.T if router is not None else w[f"{layer}.mlp.gate.u"] @ w[f"{layer}.mlp.gate.v"])
        experts = np.argsort(-scores, axis=1)[:, : text.moe.top_k].reshape(-1)
        rows = np.repeat(h, text.moe.top_k, axis=0)
        gate, up = (np.einsum("nc,nfc->nf", rows, w[f"{path}.{part}_proj.weight"][experts]) for part in ("gate", "up"))
        yield from ((f"{path}.{part}_proj", rows, experts) for part in ("gate", "up"))
        yield f"{path}.down_proj", gelu(gate) * up, experts
        x = x + numpy_decoder._experts(text, w, f"{layer}.mlp", h, gelu, None)


def test_image_positions_count(processor: Processor) -> None:
    model = tiny_model()
    one, other = (measure_importance(model, processor, [Sample("What is it?", [picture(seed)])]) for seed in (0, 1))
    path = f"{LAYERS}.0.self_attn.q_proj"
    assert one.counts[path].item() == len(encode(processor, Sample("What is it?", [picture(0)]))[0][0])
    assert not np.allclose(one.sums[path], other.sums[path], rtol=1e-3)


@pytest.mark.parametrize("name", ["sparse and dense", "all sparse, one expert each, low-rank", "dense"])
def test_llama_cpp_multiplies_the_same(name: str, processor: Processor, tmp_path: Path) -> None:
    # Names, the order of experts and of channels: all of it in llama.cpp's own graph of the file that we write.
    config = CONFIGS[name]
    model, text = tiny_model(config=config), config.text_config
    found = measure_importance(model, processor, SAMPLES[1:2])
    matrix = matrix_from_sums(text, found.sums, found.counts, dataset="", num_samples=1, num_tokens=found.num_tokens)
    folder = tiny_folder(tmp_path / "model", model=model)
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_pair(config, read_model_folder(folder), processor, name="tiny").text, find_target("F32", {}))
    ids, pixels = encode(processor, SAMPLES[1])
    assert pixels is not None
    embeddings = np.array(model.embed(ids, model.encode_images(pixels)))[0]
    if find_architecture(text).scales_inputs:
        embeddings /= np.sqrt(text.hidden_size)  # the graph of gemma multiplies whatever enters it
    products = Products()
    with watched(products):
        raw_llama.logits(path, [embeddings])

    zeros = {matrix for matrix, entry in matrix.entries.items() if not entry.counts.any()}
    assert set(products.sums) - {f for f in products.sums if "ffn_gate_inp" in f} == set(matrix.entries)
    for entry, (sums, counts) in matrix.entries.items():
        assert products.sums[entry].shape == sums.shape, entry
        if entry in zeros:
            continue
        assert products.counts[entry].tolist() == counts.tolist(), entry
        theirs = products.sums[entry]
        # Values are 1/64 as large in a re-expressed file's cache.
        factor = 64.0**2 if entry.endswith("attn_output.weight") and zeros else 1
        np.testing.assert_allclose(theirs * factor, sums, rtol=0.03, atol=0.01 * sums.mean(), err_msg=entry)


def test_a_model_is_the_same_afterwards(processor: Processor) -> None:
    model = tiny_model()
    before = {name: np.array(array) for name, array in named_arrays(model).items()}
    long = Sample("word " * 600)
    for samples in (SAMPLES, [SAMPLES[0], long]):
        try:
            measure_importance(model, processor, samples)
        except UserError as error:
            assert "sample 2 ('word word" in str(error)
        assert not any(isinstance(module, Tap) for module in model.modules())
        assert {name: np.array(array).tobytes() for name, array in named_arrays(model).items()} == {
            name: array.tobytes() for name, array in before.items()
        }


def test_a_quantized_model_is_measured_nearly_the_same(processor: Processor) -> None:
    plain, packed = tiny_model(), tiny_model()
    apply_quantization(packed, recipe_table(packed.config, "q8"))
    cpu.speed_up(packed)  # its fast networks call no linear, and must not be missed
    one, other = (measure_importance(model, processor, SAMPLES) for model in (plain, packed))
    for path, sums in one.sums.items():
        assert np.abs(other.sums[path].sum() / sums.sum() - 1) < 0.05, path


def test_samples_that_do_not_serve_are_refused(processor: Processor) -> None:
    with pytest.raises(UserError, match="there are no samples"):
        measure_importance(tiny_model(), processor, [])
    broken = tiny_model()
    broken.layers[1].self_attn.o_proj.weight = broken.layers[1].self_attn.o_proj.weight * np.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj reads what is no number"):
        measure_importance(broken, processor, SAMPLES[:1])


def matrix(seed: int = 0) -> ImportanceMatrix:
    random = np.random.default_rng(seed)
    entries = {
        "blk.1.attn_q.weight": Entry(random.random((1, 64), np.float32), np.array([7])),
        "blk.1.ffn_down_exps.weight": Entry(random.random((4, 32), np.float32), np.array([7, 1, 0, 300])),
    }
    entries["blk.1.ffn_down_exps.weight"].sums[2] = 0
    return ImportanceMatrix(entries, ["pictures"], 5, 61, "i.gguf")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", matrix())
    again = read_imatrix(tmp_path / "i.gguf")
    assert (again.datasets, again.chunk_count, again.chunk_size, again.name) == (["pictures"], 5, 61, "i.gguf")
    for name, (sums, counts) in matrix().entries.items():
        assert np.array_equal(again.entries[name].sums, sums)
        assert np.array_equal(again.entries[name].counts, counts)
    assert list(tmp_path.iterdir()) == [tmp_path / "i.gguf"]


def test_a_file_is_what_llama_quantize_reads(tmp_path: Path) -> None:
    # common_imatrix_load: these keys, and for each entry two float32 tensors whose elements divide.
    write_imatrix(tmp_path / "i.gguf", matrix())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["pictures"]
    assert reader.fields["imatrix.datasets"].types[1] == gguf.GGUFValueType.STRING
    for key, value in (("imatrix.chunk_count", 5), ("imatrix.chunk_size", 61)):
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
        assert reader.fields[key].contents() == value
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {t.tensor_type for t in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    assert list(tensors["blk.1.ffn_down_exps.weight.in_sum2"].shape) == [32, 4]  # in ggml's order
    assert list(tensors["blk.1.ffn_down_exps.weight.counts"].shape) == [1, 4]
    assert tensors["blk.1.ffn_down_exps.weight.counts"].data.reshape(-1).tolist() == [7, 1, 0, 300]
    assert all(len(name) < 64 for name in tensors)


def legacy(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    """The old format, as IMatrixCollector::save_imatrix_legacy writes it."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    return data + tail


def test_the_old_format_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(128, np.float32)
    path = tmp_path / "imatrix.dat"
    for tail, chunks, datasets in ((b"", 0, []), (struct.pack("<ii", 9, 5) + b"a.txt", 9, ["a.txt"])):
        path.write_bytes(legacy({"blk.0.attn_q.weight": (9, 9 * values)}, tail))
        found = read_imatrix(path)
        assert (found.chunk_count, found.datasets) == (chunks, datasets)
        np.testing.assert_allclose(found.entries["blk.0.attn_q.weight"].weights, values, rtol=1e-6)


def test_weights_are_means_and_nobody_knows_nothing() -> None:
    entry = Entry(np.array([[2, 4], [0, 0], [0, 0], [1, 0]], np.float32), np.array([2, 0, 5, 1]))
    assert entry.weights.tolist() == [1, 2, 1, 1, 1, 1, 1, 0]
    assert entry.weights.dtype == np.float32
    assert first_block(tiny_config().text_config) == 1
    assert (matrix().unseen_experts(1), matrix().unseen_experts(0)) == ({0: [2]}, {1: [2]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("blk.1.attn_q.weight.counts"), "is not one of a pair"),
        (lambda e: e.update({"x": np.ones((1, 1), np.float32)}), "'x' is not one of a pair"),
        (lambda e: e.update({"blk.1.attn_q.weight.counts": np.ones((3, 1), np.float32)}), "64 sums do not belong"),
        (lambda e: e.update({"blk.1.attn_q.weight.counts": np.full((1, 1), 0.5, np.float32)}), "do not belong"),
        (lambda e: e.update({"blk.1.attn_q.weight.counts": np.full((1, 1), np.nan, np.float32)}), "do not belong"),
        (lambda e: e.update({"blk.1.attn_q.weight.counts": np.full((1, 1), -1, np.float32)}), "no sum of squares"),
        (lambda e: e.update({"blk.1.attn_q.weight.in_sum2": np.full((1, 64), -1, np.float32)}), "no sum of squares"),
        (
            lambda e: e.update({"blk.1.attn_q.weight.in_sum2": np.full((1, 64), np.inf, np.float32)}),
            "no sum of squares",
        ),
        (lambda e: e.update({"blk.1.attn_q.weight.in_sum2": np.ones((1, 64), np.float16)}), "is F16, not F32"),
        (lambda e: e.clear(), "without entries"),
    ],
)
def test_a_file_that_contradicts_itself_is_named(tmp_path: Path, change: Any, message: str) -> None:
    tensors = {}
    for name, (sums, counts) in matrix().entries.items():
        tensors |= {f"{name}.in_sum2": sums, f"{name}.counts": counts.astype(np.float32)[:, None]}
    change(tensors)
    path = tmp_path / "i.gguf"
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=message) as error:
        read_imatrix(path)
    assert str(error.value).startswith(f"{path}: ")


def test_other_files_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(model, "gemma")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="a GGUF file, but no importance matrix; make one with"):
        read_imatrix(model)
    with pytest.raises(UserError, match="cannot be read"):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="cannot be read"):
        read_imatrix(tmp_path)
    for content in (b"", b"abc", b"\x00" * 64, b"\xff" * 64, struct.pack("<ii", 1, 2**31 - 1) + b"a"):
        (tmp_path / "x.dat").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.dat: "):
            read_imatrix(tmp_path / "x.dat")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("sound") / "i.gguf"
    write_imatrix(path, matrix())
    entries = {name: (3, entry.sums.reshape(-1)) for name, entry in matrix().entries.items()}
    return {"gguf": path.read_bytes(), "dat": legacy(entries, struct.pack("<ii", 3, 1) + b"a")}


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["gguf", "dat"]), place=st.integers(0, 1 << 16), byte=st.integers(0, 255), cut=st.booleans()
)
def test_a_damaged_file_is_read_or_refused_in_one_line(
    sound: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kind: str, place: int, byte: int, cut: bool
) -> None:
    data = bytearray(sound[kind])
    place %= len(data)
    data[place] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data[:place] if cut else data)
    try:
        found = read_imatrix(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.isfinite(entry.weights).all() for entry in found.entries.values())


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "model")
    out = tmp_path / "i.gguf"
    assert main(["imatrix", str(folder), "-o", str(out), "--samples", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    found = read_imatrix(out)
    names = matrix_names(tiny_config().text_config).values()
    assert set(names) <= set(found.entries)
    assert (facts["samples"], facts["entries"], found.chunk_count) == (3, len(found.entries), 3)
    assert facts["tokens"] == found.entries["blk.1.attn_q.weight"].counts.item()
    assert main(["imatrix", str(folder), "-o", str(out)]) == 2
    assert "exists; choose another file" in capsys.readouterr().err
    assert main(["imatrix", str(folder), "-o", str(out), "--force", "--samples", "1"]) == 0
    assert "1 prompts" in capsys.readouterr().out
    assert main(["imatrix", str(folder), "-o", str(folder / "config.json"), "--force"]) == 2
    assert main(["imatrix", str(folder), "-o", str(tmp_path / "no" / "i.gguf")]) == 2
    assert main(["imatrix", str(folder)]) == 2


def test_a_decoder_without_a_place_in_gguf_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder(tmp_path / "model", model=tiny_model(config=tiny_config(moe=MoEConfig(use_residual=True))))
    assert main(["imatrix", str(folder), "-o", str(tmp_path / "i.gguf")]) == 2
    assert "use_residual" in capsys.readouterr().err
