"""PyTorch's files, written by PyTorch itself and by an enemy."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gm_mlx.convert.torch_pickle import open_torch
from gm_mlx.errors import UserError
from gm_mlx.tensors import Tensor


def as_numpy(tensor: Tensor) -> np.ndarray:
    array = tensor.read()
    assert array.shape == tensor.shape
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    values = {name: (torch.arange(6) - 2).abs().reshape(2, 3).to(dtype) for dtype, name in DTYPES.items()}
    path = save(tmp_path / "x.bin", values, pickle_protocol=protocol)
    tensors = open_torch([path])
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {name: name for name in values}
    for name, value in values.items():
        expected = value.float() if value.dtype == torch.bfloat16 else value
        np.testing.assert_array_equal(as_numpy(tensors[name]), expected.numpy())
        assert as_numpy(tensors[name]).dtype == expected.numpy().dtype


def test_float64_becomes_float32(tmp_path: Path) -> None:
    value = torch.linspace(0, 1, 6, dtype=torch.float64).reshape(2, 3)
    tensors = open_torch([save(tmp_path / "x.bin", {"a": value, "t": value.T})])
    assert tensors["a"].dtype == "F32"
    np.testing.assert_array_equal(as_numpy(tensors["a"]), value.float().numpy())
    np.testing.assert_array_equal(as_numpy(tensors["t"]), value.float().numpy().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_shared_storages(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(60, dtype=torch.float32).to(dtype).reshape(3, 4, 5)
    views = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "row": base[1],
        "column": base[:, :, 2],
        "steps": base[::2, 1::2, ::3],
        "scalar": base[2, 3, 4],
        "one": base[1:2, :, 1:2],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[0].T),
        "flat": base.reshape(-1)[7:19].reshape(3, 4),
    }
    tensors = open_torch([save(tmp_path / "x.bin", views)])
    assert list(tensors) == list(views)
    for name, value in views.items():
        np.testing.assert_array_equal(as_numpy(tensors[name]), value.detach().float().numpy(), err_msg=name)


def test_only_a_tensors_own_bytes_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.zeros(4096), "b": torch.ones(4096)})
    a, b = open_torch([path]).values()
    data = path.read_bytes()
    begin = data.index(torch.ones(4096).numpy().tobytes())
    path.write_bytes(data[:begin])  # b's bytes and all behind them are gone
    assert (as_numpy(a) == 0).all()
    with pytest.raises(UserError, match=r"x\.bin: tensor 'b' is cut short"):
        b.read()
    path.unlink()
    with pytest.raises(UserError, match=r"x\.bin: cannot be read \(No such file"):
        a.read()


@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("module",), ("model",), ("model", "state_dict")])
def test_what_trainers_wrap_around(tmp_path: Path, wrapper: tuple[str, ...]) -> None:
    value: Any = OrderedDict(a=torch.ones(2), step=3, name="x", none=None, rate=0.5, size=torch.Size([1, 2]))
    value |= {"dtype": torch.bfloat16, "list": [1, (2, 3), {"x"}], 7: torch.ones(1), (1, 2): 0}
    value._metadata = OrderedDict(version=1)
    for key in reversed(wrapper):
        value = {"epoch": 1, key: value, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}}
    # A set is pickled by name below protocol 4, and no name is known but those of tensors.
    tensors = open_torch([save(tmp_path / "x.bin", value, pickle_protocol=4)])
    assert list(tensors) == ["a"]


def test_a_module_and_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tensors = open_torch([save(tmp_path / "x.bin", module.state_dict())])
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(value.shape) for name, value in module.state_dict().items()
    }


def test_two_files(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{name}.bin", {name: torch.ones(1)}) for name in "ab"]
    assert list(open_torch(files)) == ["a", "b"]
    with pytest.raises(UserError, match=r"c\.bin: tensor 'a' is in another shard too"):
        open_torch([files[0], save(tmp_path / "c.bin", {"a": torch.ones(1)})])


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def archive(path: Path, contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in contents.items():
            file.writestr(name, data)
    return path


class Run:
    """Something that a plain unpickler would run."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "(builtins|__builtin__).eval"), (torch.load, "torch.serialization.load")],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_runs(tmp_path: Path, function: Callable[..., Any], name: str, protocol: int) -> None:
    canary = tmp_path / "canary"
    command = f"__import__('pathlib').Path({str(canary)!r}).touch()" if function is eval else f"touch {canary}"
    value = {"a": torch.ones(1), "b": Run(function, command)}
    path = save(tmp_path / "x.bin", value, pickle_protocol=protocol)
    with pytest.raises(UserError, match=rf"x\.bin: asks for '{name}', .*nothing of it was run"):
        open_torch([path])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x80\x02cos\nsystem\nq\x00.", "asks for 'os.system'"),
        (b"(S'true'\nios\nsystem\n.", "uses the pickle instruction INST"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "uses the pickle instruction NEWOBJ"),
        (b"\x80\x02\x82\x01.", "uses the pickle instruction EXT1"),
        (b"\x80\x02K\x01)R.", "calls something that is not a function"),
        (b"\x80\x02ctorch\nfloat16\n)R.", "calls something that is not a function"),
        (b"\x80\x02}.", "it holds no tensors"),
        (b"\x80\x02].", "it holds no state dict"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", "it holds no tensors"),  # a dict in itself
        (b"\x80\x02.", "IndexError"),
        (b"\x80\x02}", "before seeing STOP"),
        (b"", "before seeing STOP"),
        # Where Python's own reader would ask for 64 GB of memo, and for 2**60 bytes of text.
        (b"\x80\x02}r\xff\xff\xff\xff.", "it holds no tensors"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.", "expected"),
    ],
)
def test_programs_that_are_not_state_dicts(tmp_path: Path, code: bytes, message: str) -> None:
    path = archive(tmp_path / "x.bin", {"x/data.pkl": code, "x/version": b"3"})
    with pytest.raises(UserError, match=message) as error:
        open_torch([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_nested_tuples_as_keys_take_no_time(tmp_path: Path) -> None:
    """Each tuple holds the last one twice: hashing the outermost visits 2**200 of them."""
    code = b"\x80\x02}" + b"K\x00" + b"2\x86" * 200 + b"K\x00s."
    with pytest.raises(UserError, match="it holds no tensors"):
        open_torch([archive(tmp_path / "x.bin", {"x/data.pkl": code})])


def test_deep_nesting(tmp_path: Path) -> None:
    code = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    with pytest.raises(UserError, match="it holds no state dict"):
        open_torch([archive(tmp_path / "x.bin", {"x/data.pkl": code})])


class Views:
    """Pickles tensors whose descriptions do not fit their storages."""

    def __init__(self, offset: Any, shape: Any, stride: Any, size: int = 6, key: str = "0") -> None:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=2)
        pickler.persistent_id = lambda value: (  # type: ignore[method-assign]
            ("storage", torch.FloatStorage, key, "cpu", size) if value is self else None
        )
        call = Run(torch._utils._rebuild_tensor_v2, self, offset, shape, stride, False, OrderedDict())
        pickler.dump({"a": call})
        self.code = buffer.getvalue()


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (Views(0, (7,), (1,)), "tensor 'a' reaches beyond its storage"),
        (Views(4, (3,), (1,)), "tensor 'a' reaches beyond its storage"),
        (Views(0, (2, 2), (5, 1)), "tensor 'a' reaches beyond its storage"),
        (Views(0, (2**31 - 1, 2**31 - 1), (0, 0)), "tensor 'a' repeats its storage"),
        (Views(0, (2, 4), (0, 1)), "tensor 'a' repeats its storage"),
        (Views(0, (2**31,), (0,)), "without a valid shape"),
        (Views(0, (6,), (1, 1)), "without a valid shape"),
        (Views(-1, (3,), (1,)), "in an unknown way"),
        (Views(0, (3,), (-1,)), "in an unknown way"),
        (Views(0, (True,), (1,)), "in an unknown way"),
        (Views(0, [3], (1,)), "in an unknown way"),
        (Views(2.5, (3,), (1,)), "in an unknown way"),
        (Views(0, (5,), (1,), size=5), "the data of tensor 'a' has 24 bytes instead of 20"),
        (Views(0, (6,), (1,), size=2**61), "the data of tensor 'a' has 24 bytes instead of 9223372036854775808"),
        (Views(0, (6,), (1,), key="1"), "the data of tensor 'a' is not there"),
        (Views(0, (6,), (1,), key="../../etc/passwd"), "the data of tensor 'a' is not there"),
    ],
)
def test_tensors_that_their_storages_do_not_hold(tmp_path: Path, views: Views, message: str) -> None:
    path = archive(tmp_path / "x.bin", {"x/data.pkl": views.code, "x/data/0": bytes(24)})
    with pytest.raises(UserError, match=message) as error:
        open_torch([path])
    assert str(path) in str(error.value)


def test_strides_of_single_elements_do_not_matter(tmp_path: Path) -> None:
    views = Views(0, (1, 3), (2**61, 2))
    data = np.arange(6, dtype=np.float32).tobytes()
    tensors = open_torch([archive(tmp_path / "x.bin", {"x/data.pkl": views.code, "x/data/0": data})])
    assert as_numpy(tensors["a"]).tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex128])
def test_dtypes_that_we_do_not_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.ones(2), "layer.b": torch.ones(3).to(dtype)})
    with pytest.raises(UserError, match=rf"x\.bin: tensor 'layer\.b' has dtype {str(dtype)[6:]}; save it as bfloat16"):
        open_torch([path])


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"a": torch.eye(2).to_sparse()})
    with pytest.raises(UserError, match=r"asks for 'torch\._utils\._rebuild_sparse_tensor'"):
        open_torch([path])


def test_the_format_before_1_6(tmp_path: Path) -> None:
    path = save(tmp_path / "old.bin", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.bin: PyTorch's format before 1\.6; save it again: python -c") as error:
        open_torch([path])
    code = str(error.value).split('python -c "')[1].rstrip('"')
    cwd = os.getcwd()
    try:
        os.chdir(tmp_path)
        exec(code)
    finally:
        os.chdir(cwd)
    assert as_numpy(open_torch([path])["a"]).tolist() == [1, 1]


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    good = members(save(tmp_path / "good.bin", {"a": torch.ones(100)}).read_bytes())
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: path.write_bytes(b""), "has 0 bytes and is not a PyTorch file"),
        (lambda: path.write_bytes(b"GGUF" + bytes(99)), "has 103 bytes and is not a PyTorch file"),
        (lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
        (lambda: path.write_bytes((tmp_path / "good.bin").read_bytes()[:-100]), r"is damaged \(BadZipFile\)"),
        (lambda: archive(path, {"x/version": b"3"}), r"a zip archive without data\.pkl"),
        (lambda: archive(path, good, zipfile.ZIP_DEFLATED), "is compressed, as torch.save never does"),
        (lambda: archive(path, {**good, "good/byteorder": b"big"}), "big-endian machine"),
        (lambda: archive(path, {**good, "evil/data.pkl": b"."}), r"two members 'data\.pkl'"),
        (lambda: archive(path, {"good/data.pkl": bytes((32 << 20) + 1)}), r"its data\.pkl has 33,554,433 bytes"),
    ]
    for make, message in cases:
        make()
        with pytest.raises(UserError, match=message) as error:
            open_torch([path])
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        open_torch([tmp_path / "nowhere.bin"])
    with pytest.raises(UserError, match="cannot be read"):
        open_torch([tmp_path])


def sample() -> bytes:
    buffer = io.BytesIO()
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    torch.save(OrderedDict(a=base, t=base.T, h=torch.nn.Parameter(torch.ones(3).bfloat16()), n=1, s="x"), buffer)
    return buffer.getvalue()


SAMPLE = sample()
PICKLE_AT = SAMPLE.index(b"ccollections")
changes = st.lists(
    st.tuples(
        st.one_of(st.integers(0, len(SAMPLE) - 1), st.integers(PICKLE_AT - 64, PICKLE_AT + 600)),
        st.integers(0, 3),
        st.one_of(
            st.binary(max_size=4), st.sampled_from([b"cos\nsystem\n", b"r\xff\xff\xff\xff", b"2\x86", b"R", b"b"])
        ),
    ),
    min_size=1,
    max_size=8,
)


def try_to_read(path: Path) -> None:
    """Open a file and read all of it; only a ``UserError`` of one line may come out."""
    try:
        for tensor in open_torch([path]).values():
            assert tensor.read().shape == tensor.shape
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@given(changes=changes)
def test_damaged_files_give_one_line_and_run_nothing(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bytes]]
) -> None:
    data = bytearray(SAMPLE)
    for at, length, new in changes:
        data[at : at + length] = new
    with pytest.MonkeyPatch.context() as patch:
        ran: list[Any] = []
        patch.setattr(os, "system", ran.append)
        path = tmp_path_factory.getbasetemp() / "damaged.bin"
        path.write_bytes(data)
        try_to_read(path)
        # The same damage to the pickle inside a sound archive.
        contents = members(SAMPLE)
        name = next(name for name in contents if name.endswith("data.pkl"))
        code = bytearray(contents[name])
        for at, length, new in changes:
            code[at % len(code) : at % len(code) + length] = new
        try_to_read(archive(path, {**contents, name: bytes(code)}))
        assert not ran


@given(code=st.binary(max_size=60))
def test_random_programs(tmp_path_factory: pytest.TempPathFactory, code: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    try_to_read(archive(path, {"x/data.pkl": b"\x80\x02" + code, "x/data/0": bytes(24)}))
