"""``gm-mlx chat`` with one question, and everything that can be wrong with it."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fixtures
import pytest
import tiny_gguf
from fake_engine import FakeEngine, text_of
from PIL import Image

from gm_mlx import vlm
from gm_mlx.cli.main import main
from gm_mlx.engine import Sampling
from gm_mlx.errors import UserError
from gm_mlx.llama.binding import LOG, NAMES, library

Engines = list[FakeEngine]


class Stdin:
    """A standard input that is a terminal or has been given some bytes; ``None`` is an input nobody may read."""

    def __init__(self, content: bytes | None = None, terminal: bool = False) -> None:
        self._content, self._terminal = content, terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def buffer(self) -> io.BytesIO:
        if self._content is None:
            pytest.fail("stdin was read")
        return io.BytesIO(self._content)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engines:
    """The fake engines that are loaded instead of models; the working folder is an empty one."""
    loaded: Engines = []

    def open_engine(model: str | None = None, **options: Any) -> FakeEngine:
        loaded.append(FakeEngine(model, **options))
        return loaded[-1]

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(vlm, "open_engine", open_engine)
    monkeypatch.setattr(sys, "stdin", Stdin())
    return loaded


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 6), "teal").save(path)
    return str(path)


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs ``chat``, which must fail with one line, no output and no file; returns the line."""
    assert main(["chat", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gm-mlx: error: ") and said.err.count("\n") == 1
    assert os.listdir() == []
    return said.err


def test_an_answer_goes_to_stdout_and_nothing_else(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--prompt", "What is this?"]) == 0
    assert capsys.readouterr() == ("0 images: What is this?\n", "")
    assert engines[0].closed


def test_an_answer_is_streamed(
    engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def load(model: str | None = None, **options: Any) -> FakeEngine:
        engine = FakeEngine(model, **options)
        engine.before_piece = lambda number: seen.append(capsys.readouterr().out)
        return engine

    monkeypatch.setattr(vlm, "open_engine", load)
    assert main(["chat", "--prompt", "What is this?"]) == 0
    assert seen == ["", "0 images:", " What", " is"]


def test_json_is_one_object_whatever_else_is_said(
    engines: Engines, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "notices", lambda self, images=(): [f"{len(images)} image is too large"])
    assert main(["chat", "--json", "--stats", "--top-p", "0.5", "--prompt", "Hi", "--image", picture]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert said.out.count("\n") == 1
    seconds = report.pop("seconds")
    assert report == {
        "answer": "1 images: Hi",
        "prompt_tokens": 10,
        "image_tokens": 4,
        "cached_tokens": 2,
        "generated_tokens": 2,
        "peak_memory_bytes": 3 << 20,
        "model": "gm-tiny",
        "engine": "fake",
        "finish_reason": "stop",
    }
    assert seconds.pop("load") >= 0
    assert seconds == {"encode": 0.25, "prefill": 0.5, "decode": 2.0}
    assert said.err.splitlines() == [
        "note: --top-p does nothing at --temperature 0",
        "note: 1 image is too large",
        "first token 0.75 s | prefill 16 tok/s | decode 1.0 tok/s | peak 3 MB",
    ]


def test_piped_input_is_the_question(
    engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("Où est\nle chat ?\n".encode()))
    assert main(["chat"]) == 0
    assert text_of(engines[0].asked[0][0][-1]) == "Où est\nle chat ?"


def test_input_is_not_read_beside_a_prompt(engines: Engines) -> None:
    assert main(["chat", "--prompt", "Hi"]) == 0  # reading it would fail the test


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "input is empty"), (b" \n", "input is empty"), (b"\x89PNG\xff", "not UTF-8")]
)
def test_piped_input_without_a_question(
    content: bytes, words: str, engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert words in _fails([], capsys)
    assert engines == []


@pytest.mark.parametrize(("prompt", "words"), [("", "--prompt is empty"), ("caf\udce9", "--prompt is not UTF-8")])
def test_a_prompt_without_a_question(
    prompt: str, words: str, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in _fails(["--prompt", prompt], capsys)
    assert engines == []


def test_a_conversation_needs_a_terminal_to_write_to(
    engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    assert "--prompt" in _fails([], capsys)
    assert "--json" in _fails(["--json"], capsys)
    assert engines == []


def test_options_reach_the_engine(engines: Engines) -> None:
    sampling = "--max-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --repetition-penalty 1.2 --seed 4"
    loading = "--model some/model --kv-bits 8 --max-kv-size 99 --prefill-chunk 5"
    assert main(["chat", "--prompt", "Hi", "--system", "Be brief.", *sampling.split(), *loading.split()]) == 0
    (engine,) = engines
    ((messages, _, used),) = engine.asked
    assert used == Sampling(7, 0.5, 0.9, 3, 0.1, 1.2, seed=4)
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert engine.model == "some/model"
    assert engine.options.pop("progress")
    assert engine.options == {"kv_bits": 8, "max_kv_size": 99, "prefill_chunk": 5}


def test_options_that_are_not_given_are_the_engines(engines: Engines) -> None:
    assert main(["chat", "--prompt", "Hi"]) == 0
    assert engines[0].options.keys() == {"progress"}
    assert engines[0].asked[0][2] == Sampling()


def test_images_keep_their_order(engines: Engines, picture: str, tmp_path: Path) -> None:
    Image.new("L", (3, 2)).save(tmp_path / "gray.png")
    assert main(["chat", "--prompt", "Which?", "-i", picture, "-i", str(tmp_path / "gray.png")]) == 0
    assert engines[0].asked[0][1] == [(8, 6), (3, 2)]


@pytest.mark.parametrize(("options", "size"), [([], (6, 8)), (["--no-exif"], (8, 6))])
def test_exif_orientation(options: list[str], size: tuple[int, int], engines: Engines, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (8, 6)).save(tmp_path / "photo.jpg", exif=exif)
    assert main(["chat", "--prompt", "What?", "--image", str(tmp_path / "photo.jpg"), *options]) == 0
    assert engines[0].asked[0][1] == [size]


def _bomb() -> bytes:
    """A PNG whose header promises 10 gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def _truncated() -> bytes:
    content = io.BytesIO()
    fixtures.picture(size=(64, 64)).save(content, "JPEG")
    return content.getvalue()[:-200]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.png", None),
        ("folder.png", "folder"),
        ("empty.png", b""),
        ("truncated.jpg", _truncated()),
        ("bomb.png", _bomb()),
        ("text.png", b"no image at all"),
    ],
)
@pytest.mark.parametrize("options", [["--prompt", "What is this?"], ["--prompt", "?", "--no-exif", "--json"]])
def test_a_bad_image_is_named_before_the_model_is_loaded(
    name: str,
    content: bytes | str | None,
    options: list[str],
    engines: Engines,
    picture: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert str(path) in _fails(["--image", picture, "--image", str(path), *options], capsys)
    assert engines == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read(engines: Engines, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.chmod(picture, 0)
    assert "permission" in _fails(["--image", picture, "--prompt", "What?"], capsys).lower()


def test_an_image_for_a_model_that_reads_text_only(
    engines: Engines, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_image(self: FakeEngine, source: Any) -> Any:
        raise UserError("this model reads text only")

    monkeypatch.setattr(FakeEngine, "open_image", open_image)
    for options in ([], ["--no-exif"]):
        assert "text only" in _fails(["--image", picture, "--prompt", "What?", *options], capsys)
    assert all(engine.closed for engine in engines)


def test_a_prompt_that_is_too_long(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    assert "context" in _fails(["--prompt", "word " * 100], capsys)


@pytest.mark.parametrize("moment", ["loading", "answering"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c(
    moment: str,
    options: list[str],
    engines: Engines,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    if moment == "loading":
        monkeypatch.setattr(vlm, "open_engine", interrupt)
    else:
        monkeypatch.setattr(FakeEngine, "_answer", interrupt)
    assert main(["chat", "--prompt", "Hi", *options]) == 130
    assert capsys.readouterr() == ("", "gm-mlx: interrupted\n")
    assert os.listdir() == []
    assert all(engine.closed for engine in engines)


def test_ctrl_c_leaves_what_was_said_on_a_line_of_its_own(
    engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(model: str | None = None, **options: Any) -> FakeEngine:
        engine = FakeEngine(model, **options)
        engine.before_piece = lambda number: signal.raise_signal(signal.SIGINT) if number == 2 else None
        return engine

    monkeypatch.setattr(vlm, "open_engine", load)
    assert main(["chat", "--prompt", "one two three"]) == 130
    assert capsys.readouterr() == ("0 images: one\n", "gm-mlx: interrupted\n")


def test_control_characters_are_for_files_and_not_for_terminals(
    engines: Engines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["chat", "--prompt", "\x1b[2J"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "0 images: \x1b[2J\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(arguments) == 0
    assert capsys.readouterr().out == "0 images: [2J\n"


def _without(folder: Path, name: str) -> str:
    (folder / name).unlink()
    return name


def _with_other_tensors(folder: Path, name: str) -> str:
    import mlx.core as mx

    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))  # type: ignore[arg-type]
    mx.eval(weights)
    key = next(key for key in weights if key.endswith("norm.weight"))
    array = weights.pop(key)
    weights |= {"missing": {}, "extra": {key: array, "extra.weight": array}, "misshaped": {key: array[:3]}}[name]
    mx.save_safetensors(path, weights)
    return "extra.weight" if name == "extra" else key


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_without, "config.json"),
        (_without, "model.safetensors"),
        (_without, "processor_config.json"),
        (_with_other_tensors, "missing"),
        (_with_other_tensors, "extra"),
        (_with_other_tensors, "misshaped"),
    ],
)
def test_a_model_folder_that_is_not_whole(
    spoil: Callable[[Path, str], str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    culprit = spoil(fixtures.tiny_folder(tmp_path / "model"), name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert culprit in _fails(["--model", str(tmp_path / "model"), "--prompt", "Hi"], capsys)


def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "./nowhere" in _fails(["--model", "./nowhere", "--prompt", "Hi"], capsys)


def test_a_real_model_answers(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(fixtures.tiny_folder(tmp_path / "model"))
    arguments = ["chat", "--model", folder, "--image", picture, "--max-tokens", "5", "--json", "--prompt"]
    assert main([*arguments, "red blue?"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["generated_tokens"] == 5 and report["finish_reason"] == "length"
    assert report["image_tokens"] == 4 and report["prompt_tokens"] > 4
    assert (report["model"], report["engine"]) == (folder, "mlx")
    assert main([*arguments, "red blue? " * 500]) == 2
    assert "context" in capsys.readouterr().err


# GGUF files


def test_options_for_gguf_files_reach_the_engine(engines: Engines) -> None:
    options = ["--mmproj", "v.gguf", "--gguf-file", "Q8_0", "--context", "64", "--threads", "2", "--n-gpu-layers", "0"]
    assert main(["chat", "--model", "x.gguf", *options, "--debug", "--prompt", "Hi"]) == 0
    given = {key: value for key, value in engines[0].options.items() if key != "progress"}
    assert not LOG.shown  # that is the engine's business
    assert given == {
        "mmproj": "v.gguf", "gguf_file": "Q8_0", "n_ctx": 64, "threads": 2, "gpu_layers": 0, "show_log": True,
    }  # fmt: skip


def test_a_gguf_file_answers(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_gguf.our_folder(tmp_path)[1]
    monkeypatch.chdir(tmp_path)
    arguments = ["chat", "--image", picture, "--max-tokens", "5", "--prompt", "red blue?", "--model"]
    assert main([*arguments, str(folder / "model.gguf"), "--json", "--stats"]) == 0
    said = capfd.readouterr()
    report = json.loads(said.out)
    assert report["engine"] == "llama.cpp" and report["model"] == str(folder / "model.gguf")
    assert (report["generated_tokens"], report["image_tokens"], report["finish_reason"]) == (5, 4, "length")
    assert said.err.startswith("first token") and said.err.count("\n") == 1  # llama.cpp itself is silent
    assert main([*arguments, "gguf"]) == 0
    assert capfd.readouterr() == (report["answer"] + "\n", "")


def _damaged_files(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Options with files that are wrong in the ways that people meet, and what is said of each."""
    text, mmproj = tiny_gguf.write_text(folder / "text.gguf"), tiny_gguf.write_mmproj(folder / "v.gguf")
    content = text.read_bytes()
    (folder / "cut.gguf").write_bytes(content[: len(content) // 2])
    (folder / "magic.gguf").write_bytes(b"GGML" + content[4:])
    (folder / "page.gguf").write_bytes(b"<html>not found</html>" * 20)
    keys = {key: value for key, value in tiny_gguf.text_keys().items() if key != "llama.block_count"}
    tiny_gguf.write(folder / "keys.gguf", "llama", keys, {})
    wide = tiny_gguf.write_mmproj(folder / "wide.gguf", width=96)
    return {
        "cut": (["cut.gguf"], "cut.gguf: is cut short: tensor 'blk."),
        "magic": (["magic.gguf"], "magic.gguf: is not a GGUF file; download it again"),
        "page": (["page.gguf"], "page.gguf: is not a GGUF file; download it again"),
        "keys": (["keys.gguf"], "keys.gguf: the key llama.block_count is missing; download it again"),
        "swapped": ([str(mmproj)], "v.gguf: a vision model; name the text model with --model"),
        "twice": ([str(text), "--mmproj", str(text)], "text.gguf: no vision model but one of type 'llama'"),
        "wrong": ([str(text), "--mmproj", str(wide)], "wide.gguf: llama.cpp cannot load it: mismatch between"),
        "blind": (["lone/text.gguf", "--image", "picture.png"], "text.gguf: was loaded without a vision model"),
        "missing": (["none.gguf"], "none.gguf: no such file; check the path"),
        "slow": ([str(text), "--max-kv-size", "64"], "--max-kv-size is for MLX, and this is a GGUF file"),
        "context": ([str(text), "--context", "9999"], "n_ctx: 9999 is more than the model was made for"),
    }


@pytest.mark.parametrize(
    "case",
    ["cut", "magic", "page", "keys", "swapped", "twice", "wrong", "blind", "missing", "slow", "context"],
)
def test_gguf_files_that_do_not_work_are_one_line(
    case: str, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = _damaged_files(tmp_path)[case]
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "text.gguf").hardlink_to(tmp_path / "text.gguf")
    assert main(["chat", "--prompt", "Hi", "--model", *arguments]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("gm-mlx: error: ") and said.err.count("\n") == 1
    assert message in said.err


def test_gguf_files_without_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_gguf.write_text(tmp_path / "x.gguf")
    library.cache_clear()
    for name in ("llama_cpp", *NAMES):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["chat", "--prompt", "Hi", "--model", str(path)]) == 2
    library.cache_clear()
    error = capfd.readouterr().err
    assert error.endswith("which is not installed here; pip install 'gm-mlx[gguf]'\n") and error.count("\n") == 1
