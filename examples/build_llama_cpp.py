"""Build llama.cpp's own programs from the sources that llama-cpp-python ships on PyPI.

    python examples/build_llama_cpp.py --out llama.cpp-bin [--target llama-bench ...]

The files that gm-mlx writes are for an unmodified llama.cpp, whoever built it. So they are tried on its own programs
too, and not only through Python. The sources are those of the version of llama-cpp-python that is installed, fetched
with pip or taken from ``--sdist``. A program that is there already is not built again.

It needs a C++ compiler; cmake and ninja come with ``pip install cmake ninja``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

TARGETS = ("llama-mtmd-cli", "llama-bench", "llama-quantize", "llama-imatrix", "llama-server")
PACKAGE = "llama-cpp-python"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",  # each program is one file
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_UI": "OFF",
}


def build(out: Path, targets: Sequence[str], sdist: Path | None = None) -> list[Path]:
    """Build programs into a folder; returns their paths.

    Raises:
        SystemExit: a tool is missing, or a step fails; what it printed is on stderr.
    """
    paths = [out / target for target in targets]
    missing = [path.name for path in paths if not path.is_file()]
    if not missing:
        return paths
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as folder:
        work = Path(folder)
        source = unpack(sdist or fetch(work), work) / "vendor" / "llama.cpp"
        settings = [f"-D{key}={value}" for key, value in OPTIONS.items()]
        run(tool("cmake"), "-S", source, "-B", work / "build", "-G", "Ninja", *settings, make=tool("ninja"))
        run(tool("cmake"), "--build", work / "build", "--target", *missing)
        for name in missing:
            # Beside its place and then renamed, so that a program is complete or not there.
            shutil.copy2(work / "build" / "bin" / name, out / f".{name}")
            (out / f".{name}").replace(out / name)
    return paths


def fetch(folder: Path) -> Path:
    """The source archive of the installed version, from the package index."""
    wanted = f"{PACKAGE}=={version(PACKAGE)}"
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, wanted)
    return next(folder.glob("*.tar.gz"))


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an archive; returns the folder that it holds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    return next((folder / "source").iterdir())


def tool(name: str) -> Path:
    """A program of this Python's environment, or of the system."""
    own = Path(sys.executable).parent / name
    found = own if own.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name}: not found; pip install cmake ninja")
    return Path(found)


def run(*command: object, make: Path | None = None) -> None:
    """Run a step quietly; what it says is shown when it fails."""
    words = [str(word) for word in command]
    if make is not None:
        words.append(f"-DCMAKE_MAKE_PROGRAM={make}")
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:])
        raise SystemExit(f"{Path(words[0]).name} failed with code {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the programs")
    parser.add_argument("--target", action="append", choices=TARGETS, help="a program; may be repeated [default: all]")
    parser.add_argument("--sdist", type=Path, help="llama-cpp-python's source archive, if it is here already")
    arguments = parser.parse_args()
    for path in build(arguments.out, arguments.target or TARGETS, arguments.sdist):
        print(path)


if __name__ == "__main__":
    main()
