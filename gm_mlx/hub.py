"""Find a model by the name that a user gives: the model in the box, a folder, or a repository on Hugging Face.

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
    return _fetch(name)


def _built_in() -> Path:
    folder = Path(str(resources.files("gm_mlx"))) / "models" / BUILT_IN
    if not folder.is_dir():
        raise UserError(f"{folder}: this installation lacks the built-in model; install gm-mlx again or name a model")
    return folder


def _fetch(repo: str) -> Path:
    """Download a repository, or take it from the cache; an interrupted download goes on where it stopped."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(FETCHED)))
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
