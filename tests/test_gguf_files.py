"""Which GGUF files a name stands for: local files, folders, and repositories in the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_cache import empty_cache, fill
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from tiny_gguf import our_folder, write_mmproj, write_text

import gm_mlx
from gm_mlx.errors import UserError
from gm_mlx.gguf_files import GGUFFiles, choose_mmproj, choose_model, find_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("names", "pattern", "chosen"),
    [
        (["a.gguf"], None, "a.gguf"),
        (["x-Q8_0.gguf", "x-Q4_K_M.gguf", "x-Q4_0.gguf"], None, "x-Q4_K_M.gguf"),
        (["x-q8_0.gguf", "x-q4_0.gguf"], None, "x-q4_0.gguf"),
        (["x-BF16.gguf", "x-F16.gguf"], None, "x-F16.gguf"),
        (["x-BF16.gguf", "x-Q2_K.gguf"], None, "x-BF16.gguf"),
        (["b-IQ1_S.gguf", "a-IQ1_S.gguf"], None, "a-IQ1_S.gguf"),
        (["x-Q4_K_M.gguf", "model.gguf"], None, "model.gguf"),
        (["x-Q4_K_M.gguf", "x-Q8_0.gguf"], "Q8_0", "x-Q8_0.gguf"),
        (["x-Q4_K_M.gguf", "x-Q8_0.gguf"], "*-q8_0.gguf", "x-Q8_0.gguf"),
        (["F16/x.gguf", "q4/x.gguf"], "f16/*", "F16/x.gguf"),
        (["mmproj-x-F16.gguf", "x-F32.gguf"], None, "x-F32.gguf"),
        (["x.imatrix.gguf", "imatrix.gguf", "x-F32.gguf"], None, "x-F32.gguf"),
        (["x-Q4_0-00002-of-00002.gguf", "x-Q4_0-00001-of-00002.gguf"], None, "x-Q4_0-00001-of-00002.gguf"),
    ],
)
def test_one_of_several_models(names: list[str], pattern: str | None, chosen: str) -> None:
    assert choose_model(names, pattern, "here") == chosen


def test_no_model_among_the_files() -> None:
    with pytest.raises(UserError, match=r"^here: has no text model among its GGUF files; name the folder"):
        choose_model(["mmproj-F16.gguf"], None, "here")
    with pytest.raises(
        UserError, match=r"^here: no GGUF file fits --gguf-file Q9; there are a-Q4_0\.gguf, b-Q8_0\.gguf"
    ):
        choose_model(["b-Q8_0.gguf", "a-Q4_0.gguf"], "Q9", "here")


@pytest.mark.parametrize(
    ("names", "beside", "chosen"),
    [
        (["a.gguf"], "", None),
        (["mmproj-a-BF16.gguf", "mmproj-a-F16.gguf"], "a.gguf", "mmproj-a-F16.gguf"),
        (["a-mmproj-Q8_0.gguf", "a-mmproj-f32.gguf"], "a.gguf", "a-mmproj-Q8_0.gguf"),
        (["mmproj-F16.gguf", "b/mmproj-F32.gguf"], "b/a.gguf", "b/mmproj-F32.gguf"),
    ],
)
def test_one_of_several_vision_models(names: list[str], beside: str, chosen: str | None) -> None:
    assert choose_mmproj(names, beside) == chosen


# Local files


def test_a_vision_model_beside_the_file_is_found_if_it_fits(tmp_path: Path) -> None:
    text = write_text(tmp_path / "x.gguf")
    assert find_gguf(str(text)) == GGUFFiles(text, None)
    write_mmproj(tmp_path / "mmproj-other.gguf", width=96)
    assert find_gguf(str(text)) == GGUFFiles(text, None)
    mmproj = write_mmproj(tmp_path / "x-mmproj.gguf")
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    assert find_gguf(str(text)) == GGUFFiles(text, mmproj)
    assert find_gguf(str(text), mmproj=str(tmp_path / "mmproj-other.gguf")) == GGUFFiles(
        text, tmp_path / "mmproj-other.gguf"
    )


def test_our_files_know_each_other(tmp_path: Path) -> None:
    folder = our_folder(tmp_path)[1]
    assert find_gguf(str(folder)) == GGUFFiles(folder / "model.gguf", folder / "mmproj.gguf")
    write_mmproj(folder / "mmproj.gguf")  # as wide, but not its own
    assert find_gguf(str(folder / "model.gguf")) == GGUFFiles(folder / "model.gguf", None)


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "some"
    write_text(folder / "x-Q8_0.gguf")
    assert find_gguf(str(folder)) == GGUFFiles(folder / "x-Q8_0.gguf", None)
    (folder / "model.safetensors").touch()
    assert find_gguf(str(folder)) is None  # for MLX
    assert find_gguf(str(folder), pattern="Q8") == GGUFFiles(folder / "x-Q8_0.gguf", None)
    (tmp_path / "empty").mkdir()
    assert find_gguf(str(tmp_path / "empty")) is None


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text, mmproj = write_text(tmp_path / "x.gguf"), write_mmproj(tmp_path / "v.gguf")
    assert find_gguf("~/x.gguf", mmproj="~/v.gguf") == GGUFFiles(text, mmproj)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.gguf",), "^no.gguf: no such file; check the path"),
        (("x.gguf", "no.gguf"), "^no.gguf: no such file; check the path of --mmproj"),
        ((None, "x.gguf"), "^--mmproj is for GGUF files, and gm-tiny is none"),
        (("gm-tiny", None, "Q8_0"), "^--gguf-file is for GGUF files, and gm-tiny is none"),
        (("empty", None, "Q8_0"), "^--gguf-file is for GGUF files, and empty is none"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str | None, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=message):
        find_gguf(*arguments)


# Repositories


def test_a_repository_in_the_cache(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "x-Q4_0.gguf", "x-Q8_0.gguf", "mmproj-x-F16.gguf", "mmproj-x-F32.gguf")
    assert find_gguf("org/name") == GGUFFiles(snapshot / "x-Q4_0.gguf", snapshot / "mmproj-x-F16.gguf")
    assert find_gguf("org/name", pattern="Q8_0") == GGUFFiles(snapshot / "x-Q8_0.gguf", snapshot / "mmproj-x-F16.gguf")
    with pytest.raises(UserError, match=r"^org/name: no GGUF file fits --gguf-file Q5; there are x-Q4_0\.gguf, x-Q8_0"):
        find_gguf("org/name", pattern="Q5")


def test_a_repository_for_mlx_stays_that(cache: Path) -> None:
    fill(cache, "org/name", "model.safetensors", "x-Q4_0.gguf")
    assert find_gguf("org/name") is None
    fill(cache, "org/other", "tokenizer.json")
    assert find_gguf("org/other") is None


def test_a_vision_model_of_ones_own(cache: Path, tmp_path: Path) -> None:
    snapshot = fill(cache, "org/name", "x-Q4_0.gguf", "mmproj-x-F16.gguf")
    mmproj = write_mmproj(tmp_path / "v.gguf")
    assert find_gguf("org/name", mmproj=str(mmproj)) == GGUFFiles(snapshot / "x-Q4_0.gguf", mmproj)


def test_only_the_chosen_files_are_fetched(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [
        "config.json", "README.md", "run.py", "mmproj-F16.gguf", "mmproj-F32.gguf", "x-Q8_0.gguf", "imatrix.gguf",
        "x-Q4_K_M-00001-of-00002.gguf", "x-Q4_K_M-00002-of-00002.gguf",
    ]  # fmt: skip
    fetched: set[str] = set()

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            fetched.add(name)
            (tmp_path / "snapshot" / name).touch()
        return str(tmp_path / "snapshot")

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: files)
    found = find_gguf("org/name")
    assert found is not None and found.model.name == "x-Q4_K_M-00001-of-00002.gguf"
    assert fetched == {
        "config.json", "mmproj-F16.gguf", "x-Q4_K_M-00001-of-00002.gguf", "x-Q4_K_M-00002-of-00002.gguf",
    }  # fmt: skip


def test_a_hub_that_is_down_leaves_the_cache(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot = fill(cache, "org/name", "x-Q4_0.gguf")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(snapshot))
    assert find_gguf("org/name") == GGUFFiles(snapshot / "x-Q4_0.gguf", None)


def test_a_name_that_is_nothing(cache: Path) -> None:
    assert find_gguf("nowhere") is None
    with pytest.raises(UserError, match=r"^org/name: .*not complete in the local cache"):
        find_gguf("org/name")


# The Python API


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kv_size": 64}, "--max-kv-size is for MLX, and this is a GGUF file; leave it out"),
        ({"dtype": "float16"}, "dtype is for MLX, and this is a GGUF file; leave it out"),
    ],
)
def test_options_for_mlx(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gm_mlx.load(str(write_text(tmp_path / "x.gguf")), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 2}, "--threads is for GGUF files, and this is a model folder; leave it out"),
        ({"n_ctx": 64}, "--context is for GGUF files"),
        ({"gpu_layers": 0}, "--n-gpu-layers is for GGUF files"),
        ({"mmproj": "x.gguf"}, "--mmproj is for GGUF files, and gm-tiny is none"),
    ],
)
def test_options_for_llama_cpp(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gm_mlx.load(**options)
