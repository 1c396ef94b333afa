"""Find a model by the name that a user gives: the model in the box, a folder, or a repository on Hugging Face.

A model to run and a checkpoint to convert are found in the same way, but of a checkpoint other files are needed.

Only data is fetched (configurations, weights, tokenizers). Code in a repository is neither fetched nor run.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from gm_mlx.errors import UserError

BUILT_IN = "gm-tiny"
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
        return _built_in()
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf":
        raise UserError(f"{name}: GGUF files are not supported by this version of gm-mlx; name a model folder")
    if name and path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name}: a file, not a model; name the folder that has the config.json")
    if not REPO_ID.fullmatch(name):
        raise UserError(
            f"{name}: no such folder; name a model folder, a Hugging Face repository (org/name) or {BUILT_IN!r}"
        )
    return _fetch(name, FETCHED)


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
    folder = _fetch(name, FETCHED_SOURCE)
    if not any(folder.glob("model*.safetensors")):
        folder = _fetch(name, FETCHED_SOURCE + FETCHED_PICKLES)
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


def _built_in() -> Path:
    folder = Path(str(resources.files("gm_mlx"))) / "models" / BUILT_IN
    if not folder.is_dir():
        raise UserError(f"{folder}: this installation lacks the built-in model; install gm-mlx again or name a model")
    return folder


def _fetch(repo: str, patterns: tuple[str, ...]) -> Path:
    """Download files of a repository, or take them from the cache; an interrupted download goes on where it stopped."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
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
