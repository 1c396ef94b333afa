"""Find a model by the name that a user gives: the model in the box, a folder, or a repository on Hugging Face.

A model to run and a checkpoint to convert are found in the same way, but of a checkpoint other files are needed.

Only data is fetched (configurations, weights, tokenizers). Code in a repository is neither fetched nor run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TypeVar

from gm_mlx.errors import UserError

Answer = TypeVar("Answer")

BUILT_IN = "gm-tiny"
BUILT_IN_GGUF = "gm-tiny-gguf"  # the same for llama.cpp
FETCHED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja")
# Of a checkpoint: weights under the names that converters read, so that copies in other formats stay where they are.
FETCHED_SOURCE = (
    "*.json", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "*.jinja",
    "model.safetensors", "model-*.safetensors",
    "adapter_model.safetensors", "adapter_model.bin", "mm_projector.bin", "non_lora_trainables.bin",
)  # fmt: skip
FETCHED_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")
SOURCE_WEIGHTS = re.compile(
    r"model(-.*)?\.safetensors|pytorch_model(-.*)?\.bin|adapter_model\..*|mm_projector\.bin|non_lora_trainables\.bin"
)
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def find_model(name: str | None = None) -> Path:
    """The folder of a model.

    Args:
        name: None or "gm-tiny" for the model that ships with the package, a folder, or a Hugging Face repository
            ``org/name``, which is fetched when it is not in the local cache. A folder wins over a repository.

    Returns:
        A folder that exists; whether it holds a model is seen when it is loaded.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    if name is None or name == BUILT_IN:
        return built_in()
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf":
        raise UserError(f"{name}: a GGUF file where a model folder is needed; name the folder that it was made from")
    if name and path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name}: a file, not a model; name the folder that has the config.json")
    if not REPO_ID.fullmatch(name):
        raise UserError(
            f"{name}: no such folder; name a model folder, a Hugging Face repository (org/name) or {BUILT_IN!r}"
        )
    return fetch(name, FETCHED)


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint to convert.

    Args:
        name: a folder, or a Hugging Face repository ``org/name``. Of a repository, PyTorch's own weight files are
            fetched only when it has no safetensors; what the local cache has is not fetched again.

    Returns:
        A folder that exists; what it holds is seen when it is opened.

    Raises:
        UserError: there is no such checkpoint, it cannot be fetched, or the repository has no weights.
    """
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise UserError(f"{name}: GGUF files cannot be converted back; name the checkpoint that it was made from")
    if path.is_file():
        raise UserError(f"{name}: a file, not a checkpoint; name the folder that has the config.json")
    if not REPO_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder; name a checkpoint's folder or a Hugging Face repository (org/name)")
    folder = fetch(name, FETCHED_SOURCE)
    if not any(folder.glob("model*.safetensors")):
        folder = fetch(name, FETCHED_SOURCE + FETCHED_PICKLES)
    if not any(SOURCE_WEIGHTS.fullmatch(entry.name) for entry in folder.iterdir()):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name}: no weights in the local cache, and HF_HUB_OFFLINE is set; unset it to fetch the rest"
            )
        raise UserError(
            f"{name}: a repository without weights that can be converted (safetensors or pytorch_model.bin)"
        )
    return folder


def built_in(name: str = BUILT_IN) -> Path:
    """The folder of a model in the box; raises ``UserError`` if this installation lacks it."""
    folder = Path(str(resources.files("gm_mlx"))) / "models" / name
    if not folder.is_dir():
        raise UserError(f"{folder}: this installation lacks the built-in model; install gm-mlx again or name a model")
    return folder


def fetch(repo: str, patterns: tuple[str, ...]) -> Path:
    """Download files of a repository, or take them from the cache; an interrupted download goes on where it stopped."""
    from huggingface_hub import snapshot_download

    return Path(_asked(repo, lambda: snapshot_download(repo, allow_patterns=list(patterns))))


def repository_files(repo: str) -> list[str]:
    """Names of all files of a repository; without a network, of those in the local cache."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        try:
            return _asked(repo, lambda: HfApi(endpoint=constants.ENDPOINT).list_repo_files(repo))
        except UserError:
            if not (folder := fetch(repo, ())).is_dir():
                raise
    else:
        folder = fetch(repo, ())
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _asked(repo: str, ask: Callable[[], Answer]) -> Answer:
    """What the hub's client answers; all that it can raise as a ``UserError``."""
    from huggingface_hub import constants, errors

    try:
        return ask()
    except errors.GatedRepoError:
        raise UserError(f"{repo}: asks for an agreement; accept it on its page and run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo}: no such folder, and no such repository on {constants.ENDPOINT}; check the name, and run "
            "`hf auth login` if it is private"
        ) from None
    except errors.LocalEntryNotFoundError:
        reason = f"{constants.ENDPOINT} cannot be reached; check the connection"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set; unset it to fetch the rest"
        raise UserError(f"{repo}: no such folder, not complete in the local cache, and {reason}") from None
    except errors.HFValidationError:
        raise UserError(f"{repo}: not a name that a Hugging Face repository can have; check it") from None
    except Exception as error:  # the client lets its HTTP library's errors through, and that library has changed before
        lines = str(error).split("\n")
        raise UserError(f"{repo}: cannot be fetched ({lines[0] or type(error).__name__}); try again later") from None
