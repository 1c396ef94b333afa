"""The BLAS that is put in MLX's way on Linux. Every test is its own process: what is loaded cannot be unloaded."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux needs it")
STATUS = "import gm_mlx._blas as b; print(b.preload().loaded, b.status(), sep='|')"


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "GM_MLX_BLAS"}
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=True)


def test_importing_the_package_does_not_import_mlx() -> None:
    assert run("import sys, gm_mlx; print('mlx' in sys.modules)").stdout == "False\n"


@linux
def test_off() -> None:
    assert run(STATUS, GM_MLX_BLAS="off").stdout == "False|off (GM_MLX_BLAS)\n"
    maps = "import gm_mlx, mlx.core; print('openblas' in open('/proc/self/maps').read())"
    assert run(maps, GM_MLX_BLAS="off").stdout == "False\n"


@linux
def test_too_late() -> None:
    assert run(f"import mlx.core; {STATUS}").stdout.startswith("False|too late: ")


@linux
def test_a_named_library_that_is_missing_warns_and_names_it() -> None:
    result = run(STATUS, GM_MLX_BLAS="/nowhere/libfast.so")
    assert result.stdout.startswith("False|none: /nowhere/libfast.so")
    assert "RuntimeWarning: GM_MLX_BLAS=/nowhere/libfast.so" in result.stderr


@linux
def test_a_library_that_is_no_blas_is_refused() -> None:
    libm = ctypes.util.find_library("m")
    assert libm is not None
    assert run(STATUS, GM_MLX_BLAS=libm).stdout == f"False|none: {libm}: has no cblas_sgemm with 32-bit integers\n"


@linux
def test_nothing_found_names_the_package_to_install() -> None:
    code = f"import gm_mlx._blas as b; b._candidates = lambda: ['libnot_there.so']; b.preload.cache_clear(); {STATUS}"
    assert "install libopenblas0-pthread" in run(code).stdout


@linux
def test_cuda_is_left_alone(tmp_path) -> None:
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    assert run(STATUS, PYTHONPATH=str(tmp_path)).stdout == "False|not needed with MLX for CUDA\n"


def test_other_systems_load_nothing() -> None:
    code = f"import sys; sys.platform = 'darwin'; {STATUS}"
    assert run(code).stdout == "False|not needed on macOS\n"


@linux
def test_mlx_multiplies_with_the_library_that_was_loaded() -> None:
    # The loader is asked, not the clock.
    loaded, text = run(STATUS).stdout.strip().split("|")
    if loaded != "True":
        pytest.skip(text)
    code = "import gm_mlx, mlx.core as mx; mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))"
    bindings = [line for line in run(code, LD_DEBUG="bindings").stderr.splitlines() if "`cblas_sgemm'" in line]
    assert any("libmlx.so" in line.split(" to ")[0] and "libblas-" not in line.split(" to ")[1] for line in bindings)
