"""The door to llama.cpp: every name that is used, what is said when it is not there, and the log."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from gm_mlx.errors import UserError
from gm_mlx.llama import binding
from gm_mlx.llama.binding import CONTINUED, ERROR, NAMES, WARNING, Log, library, library_file


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is loaded anew, and once more after the test."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_names(module: str, name: str) -> None:
    assert hasattr(import_module(module), name), f"llama-cpp-python has no {module}.{name} any more"


def test_nothing_else_can_be_used() -> None:
    names = {name for names in NAMES.values() for name in names}
    assert set(vars(library())) == names | {"listener"}
    assert library_file().is_file() and "mtmd" in library_file().name


def test_without_llama_cpp(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama_cpp", *NAMES):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"^GGUF files need llama\.cpp, .* pip install 'gm-mlx\[gguf\]'$"):
        library()


def test_a_library_that_does_not_load(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("Failed to load shared library\nlibgomp.so.1")

    monkeypatch.setattr(binding, "import_module", fail)
    with pytest.raises(UserError, match=r"cannot be loaded \(Failed to load shared library libgomp\.so\.1\); install"):
        library()


def test_another_version(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_module("llama_cpp.mtmd_cpp"), "mtmd_tokenize_from_parts")
    with pytest.raises(UserError, match=r"llama-cpp-python \d.* has no llama_cpp\.mtmd_cpp\.mtmd_tokenize_from_parts"):
        library()


def test_the_first_error_is_the_reason() -> None:
    log = Log()
    log.shown = False
    log.hear(WARNING, b"w: never mind\n")
    log.hear(CONTINUED, b"really\n")
    assert log.reason() == "no reason given"
    log.hear(ERROR, b"llama_model_load: error loading model: missing tensor ")
    log.hear(CONTINUED, b"'x'\n")
    log.hear(ERROR, b"llama_model_load_from_file_impl: failed to load model\n")
    assert log.reason() == "missing tensor 'x'"
    log.clear()
    assert log.reason() == "no reason given"


def test_the_log_is_silent_unless_asked_for(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(binding.SHOW_LOG, raising=False)
    Log().hear(ERROR, b"hush\n")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv(binding.SHOW_LOG, "1")
    Log().hear(ERROR, b"speak\n")
    assert capfd.readouterr() == ("", "speak\n")


def test_every_name_is_used() -> None:
    root = Path(binding.__file__).parents[2]
    files = [path for folder in ("gm_mlx", "convert") for path in (root / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in files)
    unused = [name for names in NAMES.values() for name in names if not re.search(rf"\.{name}\b", text)]
    assert unused == []
