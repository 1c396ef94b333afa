"""A fast BLAS for MLX on Linux CPUs.

MLX's CPU wheel brings the reference BLAS, which runs on one core without SIMD. It looks ``cblas_sgemm`` up in the
process's global scope first, so an OpenBLAS (or MKL) that is loaded there before MLX takes its place: float32 matrix
products become 30 to 70 times faster. Nothing else of MLX changes, and nothing is loaded on macOS or under CUDA.

The environment variable ``GM_MLX_BLAS`` is "off", or the path of a library to load instead of the one found.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Threaded builds first: Fedora and openSUSE ship a serial libopenblas.so.0 beside them, Debian's is threaded.
SYSTEM_LIBRARIES = (
    "libopenblasp.so.0",
    "libopenblas_pthreads.so.0",
    "libopenblaso.so.0",
    "libopenblas.so.0",
    "libopenblas.so",
)
# In an environment's own lib folder: conda's OpenBLAS, and MKL as `pip install mkl` puts it there.
ENVIRONMENT_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.*")

REMEDY = "install libopenblas0-pthread (Debian, Ubuntu), openblas-threads (Fedora), or `pip install mkl`"


class Outcome(NamedTuple):
    """Whether a BLAS was loaded for MLX, and the line that tells a user about it."""

    loaded: bool
    text: str


@cache
def preload() -> Outcome:
    """Load a BLAS for MLX, once per process. Call before ``mlx.core`` is imported; never raises."""
    choice = os.environ.get("GM_MLX_BLAS", "")
    if sys.platform != "linux":
        return Outcome(False, "not needed on macOS" if sys.platform == "darwin" else f"not needed on {sys.platform}")
    if choice.lower() == "off":
        return Outcome(False, "off (GM_MLX_BLAS)")
    if _has_cuda():
        return Outcome(False, "not needed with MLX for CUDA")
    if "mlx.core" in sys.modules:
        return Outcome(False, "too late: mlx was imported before gm_mlx; import gm_mlx first")
    names = [choice] if choice else _candidates()
    problems: dict[str, str] = {}
    for name in names:
        try:
            return Outcome(True, _load(name))
        except OSError as error:
            problems[name] = str(error)
    if choice:
        # Someone asked for this very library: to go on without it in silence would cost them a factor of 30.
        warnings.warn(f"GM_MLX_BLAS={choice}: {problems[choice]}", RuntimeWarning, stacklevel=2)
        return Outcome(False, f"none: {problems[choice]}")
    return Outcome(False, f"none found: {REMEDY}")


def status() -> str:
    """What is in use, for ``gm-mlx info --system``; for example "OpenBLAS 0.3.21 (libopenblas.so.0)"."""
    return preload().text


def _candidates() -> list[str]:
    """Names for the dynamic loader, best first."""
    folder = Path(sys.prefix) / "lib"
    return [str(path) for name in ENVIRONMENT_LIBRARIES for path in sorted(folder.glob(name))] + [*SYSTEM_LIBRARIES]


def _load(name: str) -> str:
    """Load library ``name`` into the global scope and return its name and version; ``OSError`` when it is none."""
    import ctypes

    library = ctypes.CDLL(name)  # local first: a library that is refused below must not leak its symbols
    if not hasattr(library, "cblas_sgemm"):
        raise OSError(f"{name}: has no cblas_sgemm with 32-bit integers")
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    shown = os.path.basename(name)
    if not hasattr(library, "openblas_get_config"):
        return shown
    library.openblas_get_config.restype = ctypes.c_char_p
    words = library.openblas_get_config().decode(errors="replace").split()
    return f"{' '.join(words[:2])} ({shown})"


def _has_cuda() -> bool:
    """Whether MLX is installed with its CUDA backend; found on disk, since importing MLX would be too late."""
    return any(any(Path(folder).glob("mlx_cuda*.dist-info")) for folder in sys.path)
