"""What a measurement was made on: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gm_mlx import __version__
from gm_mlx.devices import all_memory
from gm_mlx.llama.model import physical_cores

PACKAGES = ("mlx", "mlx-lm", "llama-cpp-python", "numpy")
AVAILABLE_ON_MACOS = 2 / 3  # of all memory, as nothing says how much of it is free


def machine_facts() -> dict[str, Any]:
    """The processor, the system and the versions of what computes; None for what is not installed."""
    return {
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": all_memory(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"gm-mlx": __version__, **{name: _version(name) for name in PACKAGES}},
    }


def cpu_name() -> str:
    """The processor's name as its maker writes it, or its architecture."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def available_memory() -> int:
    """Bytes that programs can still get."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return 1024 * int(found[1]) if found else int(AVAILABLE_ON_MACOS * all_memory())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
