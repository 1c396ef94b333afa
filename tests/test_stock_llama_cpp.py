"""Our files in llama.cpp's own program, built from its sources without a patch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from gm_mlx.cli.main import main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import build_llama_cpp  # noqa: E402

PICTURE = ROOT / "examples" / "images" / "shapes.png"


@pytest.fixture(scope="module")
def mtmd_cli(pytestconfig: pytest.Config) -> Path:
    """llama-mtmd-cli; built once for each version of llama-cpp-python, which takes minutes."""
    folder = pytestconfig.cache.mkdir(f"llama.cpp-{version('llama-cpp-python')}")
    return build_llama_cpp.build(folder, ["llama-mtmd-cli"])[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_answers_about_a_picture(mtmd_cli: Path, kind: str, tmp_path: Path) -> None:
    assert main(["convert", "gm-tiny", "-o", str(tmp_path / "out"), "--to", "gguf", "--quantize", kind]) == 0
    files = ["-m", tmp_path / "out" / "model.gguf", "--mmproj", tmp_path / "out" / "mmproj.gguf"]
    question = ["--image", PICTURE, "-p", "what color is the circle?", "--temp", "0", "-n", "16", "-t", "2"]
    done = subprocess.run(
        [str(word) for word in [mtmd_cli, *files, *question]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "red"
