"""Names of models: the one in the box, folders, and repositories, with the hub's own client and no network."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_cache import empty_cache, fill
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from gm_mlx import hub
from gm_mlx.errors import UserError
from gm_mlx.hub import FETCHED, find_checkpoint, find_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [None, "gm-tiny"])
def test_the_model_in_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"models/gm-tiny: this installation lacks the built-in model"):
        find_model(name)
    (tmp_path / "models" / "gm-tiny").mkdir(parents=True)
    assert find_model(name) == tmp_path / "models" / "gm-tiny"


def test_a_folder_wins_over_a_repository(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_model("org/name") == Path("org/name")
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/org") == tmp_path / "org"


def test_a_repository_in_the_cache_needs_no_network(cache: Path) -> None:
    snapshot = fill(cache, "org/Name-2b.v1_x")
    assert find_model("org/Name-2b.v1_x") == snapshot


@pytest.mark.parametrize("name", ["model.gguf", "org/model.gguf", "~/x/model.gguf"])
def test_gguf_files(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: a GGUF file where a model folder is needed; name"):
        find_model(name)


@pytest.mark.parametrize(
    "name", ["", "nowhere", "~nobody/x/y", "a/b/c", "/no/such/folder", "./x", "org/", "org/näme", "a b/c", "x\n/y"]
)
def test_neither_a_folder_nor_a_repository(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such folder; name a model folder"):
        find_model(name)


def test_a_name_that_the_hub_refuses(cache: Path) -> None:
    with pytest.raises(UserError, match="a/b--c: not a name that a Hugging Face repository can have"):
        find_model("a/b--c")


def test_a_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.safetensors: a file, not a model"):
        find_model("model.safetensors")


def test_offline_and_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(UserError, match=r"^org/name: .*not complete in the local cache, and HF_HUB_OFFLINE is set"):
        find_model("org/name")


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    # The default client object took the address when it was made.
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """A hub on this machine that answers every request with ``server.reply``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = self.server.reply  # type: ignore[attr-defined]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, "RepoNotFound"), "no such folder, and no such repository on http"),
        ((403, "GatedRepo"), "asks for an agreement"),
    ],
)
def test_repositories_that_the_hub_does_not_give(
    cache: Path, monkeypatch: pytest.MonkeyPatch, server: HTTPServer, reply: tuple[int, str], message: str
) -> None:
    server.reply = reply  # type: ignore[attr-defined]
    online(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(UserError, match=f"^org/name: {message}") as error:
        find_model("org/name")
    assert "\n" not in str(error.value)


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    online(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"not complete in the local cache, and http://127\.0\.0\.1:{port} cannot be"):
        find_model("org/name")
    snapshot = fill(cache, "org/name")
    assert find_model("org/name") == snapshot


def test_errors_of_the_client_are_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"^org/name: cannot be fetched \(disk full\); try again later$"):
        find_model("org/name")


def test_data_is_fetched_and_code_is_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kwargs: asked.update(kwargs) or "here")
    assert find_model("org/name") == Path("here")
    assert asked == {"allow_patterns": list(FETCHED)}
    data = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "tokenizer.json", "processor_config.json", "gm.json", "chat_template.jinja", "spiece.model",
    ]  # fmt: skip
    other = ["modeling_x.py", "pytorch_model.bin", "model.ckpt", "README.md", "onnx/model.onnx", "run.sh", "x.gguf"]
    assert list(filter_repo_objects([*data, *other], allow_patterns=list(FETCHED))) == data


def test_a_checkpoint_in_a_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, "org/name", "pytorch_model.bin")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_checkpoint("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "weights",
    [
        "model.safetensors", "model-00001-of-00002.safetensors",
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "mm_projector.bin",
        "adapter_model.safetensors", "adapter_model.bin",
    ],
)  # fmt: skip
def test_a_checkpoint_in_the_cache_needs_no_network(cache: Path, weights: str) -> None:
    snapshot = fill(cache, "org/Name-2b.v1_x", weights)
    assert find_checkpoint("org/Name-2b.v1_x") == snapshot


def test_the_cache_that_the_environment_names(tmp_path: Path) -> None:
    """In a process of its own, because the client reads its environment once."""
    snapshot = fill(tmp_path / "elsewhere", "org/name", "model.safetensors")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    code = "from gm_mlx.hub import find_checkpoint; print(find_checkpoint('org/name'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(snapshot)


def test_a_checkpoint_without_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill(cache, "org/name", "tokenizer.json", "model.safetensors.index.json")
    with pytest.raises(UserError, match=r"^org/name: no weights in the local cache, and HF_HUB_OFFLINE is set; unset"):
        find_checkpoint("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kwargs: str(snapshot))
    with pytest.raises(UserError, match=r"^org/name: a repository without weights that can be converted"):
        find_checkpoint("org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no such folder; name a checkpoint's folder or"),
        ("nowhere", "no such folder; name a checkpoint's folder or"),
        ("a/b/c", "no such folder; name a checkpoint's folder or"),
        ("gm-tiny", "no such folder; name a checkpoint's folder or"),
        ("model.gguf", "GGUF files cannot be converted back"),
        ("pytorch_model.bin", "a file, not a checkpoint"),
        ("org/name", "not complete in the local cache, and HF_HUB_OFFLINE is set"),
        ("a/b--c", "not a name that a Hugging Face repository can have"),
    ],
)
def test_no_checkpoint(cache: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=rf"^{name}: .*{message}"):
        find_checkpoint(name)


SIDE_FILES = {
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model", "tokenizer.json",
    "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja", "adapter_config.json",
}  # fmt: skip
CODE = {"modeling_x.py", "README.md", "training_args.bin", "optimizer.pt", "onnx/model.onnx", "x.gguf", "tf_model.h5"}
PICKLES = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
SAFETENSORS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (SAFETENSORS | PICKLES, SAFETENSORS),
        (PICKLES, PICKLES),
        ({"model.safetensors", "consolidated.safetensors", "model.fp16.bin"}, {"model.safetensors"}),
        ({"pytorch_model.bin", "mm_projector.bin"}, {"pytorch_model.bin", "mm_projector.bin"}),
        ({"adapter_model.bin", "non_lora_trainables.bin"}, {"adapter_model.bin", "non_lora_trainables.bin"}),
        ({"adapter_model.safetensors", "non_lora_trainables.bin", "checkpoint-9/model.safetensors"},
         {"adapter_model.safetensors", "non_lora_trainables.bin"}),
    ],
)  # fmt: skip
def test_what_is_fetched_of_a_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: set[str], fetched: set[str]
) -> None:
    def download(repo: str, *, allow_patterns: list[str]) -> str:
        for name in filter_repo_objects(files | SIDE_FILES | CODE, allow_patterns=allow_patterns):
            (tmp_path / "snapshot" / name).touch()
        return str(tmp_path / "snapshot")

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = find_checkpoint("org/name")
    assert {path.name for path in folder.iterdir()} == fetched | SIDE_FILES
