"""A finished model folder, put on Hugging Face."""

from __future__ import annotations

from pathlib import Path

from gm_mlx.errors import UserError
from gm_mlx.hub import REPO_ID


def check_upload(repo: str) -> None:
    """Make sure that an upload can begin, before hours of work: the name, and that somebody is logged in.

    Raises:
        UserError: what to put right.
    """
    if not REPO_ID.fullmatch(repo):
        raise UserError(f"--upload {repo}: not a repository's name; write it as owner/name")
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--upload {repo}: HF_HUB_OFFLINE is set; unset it to upload")
    try:
        HfApi().whoami()
    except Exception as error:  # the client lets its HTTP library's errors through
        raise UserError(f"--upload {repo}: {_reason(error)}; run `hf auth login` with a token that may write") from None


def upload(folder: Path, repo: str, *, public: bool = False) -> str:
    """Put a model folder on Hugging Face; files of a model that was there before are removed.

    Args:
        folder: a complete model folder.
        repo: "owner/name"; made if it does not exist.
        public: whether everybody may see a repository that is made now. One that exists stays as it is.

    Returns:
        The address of the repository.

    Raises:
        UserError: it cannot be uploaded. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message="Upload with gm-mlx",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:
        raise UserError(
            f"--upload {repo}: {_reason(error)}; the model is in {folder}, and `hf upload {repo} {folder}` tries again"
        ) from None
    return str(url)


def _reason(error: Exception) -> str:
    """The first line of an error of the hub's client."""
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".") or type(error).__name__
