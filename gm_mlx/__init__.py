"""gm-mlx: sparse vision-language models that answer questions about pictures on your own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gm_mlx import _blas

if TYPE_CHECKING:
    from gm_mlx.engine import Piece, Sampling, Stats
    from gm_mlx.errors import UserError
    from gm_mlx.vlm import VLM, Answer, Conversation, load

_blas.preload()  # before anything imports mlx

__version__ = "0.1.0"
__all__ = ["VLM", "Answer", "Conversation", "Piece", "Sampling", "Stats", "UserError", "__version__", "load"]

# Where the public names live; imported when first used, so that `gm-mlx --help` need not wait for them.
_HOMES = {
    "Answer": "vlm",
    "Conversation": "vlm",
    "Piece": "engine",
    "Sampling": "engine",
    "Stats": "engine",
    "UserError": "errors",
    "VLM": "vlm",
    "load": "vlm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
