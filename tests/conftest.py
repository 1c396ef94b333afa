"""What holds for every test."""

from __future__ import annotations

import gm_mlx  # noqa: F401  isort: skip  # finds BLAS, which must happen before any test imports mlx

import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from gm_mlx.processor import Processor

# How long an example takes depends on what else the machine does, and says nothing about the code.
settings.register_profile("gm-mlx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gm-mlx")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What gm-mlx remembers of files and libraries does not come from the user's home, nor go there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """The tiny model's processor, for tests that read training data."""
    import train_runs

    return train_runs.reader(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def compile_again() -> Iterator[None]:
    """An engine on a CPU switches ``mx.compile`` off for the process; the next test finds MLX as it comes."""
    yield
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].enable_compile()


# A shell without job control starts background jobs with Ctrl-C ignored, and so would all their children be.
signal.signal(signal.SIGINT, signal.default_int_handler)
