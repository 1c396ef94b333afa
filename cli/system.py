"""What runs here and on what, in a form to paste into a bug report: ``gm-mlx info --system``."""

from __future__ import annotations

import platform
from typing import Any

from gm_mlx import __version__
from gm_mlx.cli.console import size
from gm_mlx.devices import all_memory
from gm_mlx.errors import UserError

LABELS = {
    "version": "gm-mlx",
    "python": "Python",
    "platform": "Platform",
    "mlx": "MLX",
    "mlx_lm": "mlx-lm",
    "device": "Device",
    "device_memory_bytes": "Device memory",
    "memory_bytes": "Memory",
    "blas": "BLAS",
    "models_folder": "Downloaded models",
    "gm_tiny": "gm-tiny",
}
MISSING = {"gm_tiny": "not in this installation"}


def show_system(facts: dict[str, Any]) -> None:
    """Prints ``system_facts`` as lines."""
    width = max(map(len, LABELS.values()))
    for key, label in LABELS.items():
        value = facts[key] if facts[key] is not None else MISSING.get(key)
        if value is not None:
            print(f"{label:{width}}  {size(value) if key.endswith('_bytes') else value}")


def system_facts() -> dict[str, Any]:
    """Returns the keys of ``LABELS``; what there is not on this machine is None."""
    from importlib.metadata import version

    from huggingface_hub.constants import HF_HUB_CACHE

    from gm_mlx import _blas

    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        **_device(),
        "memory_bytes": all_memory(),
        "blas": _blas.status(),
        "models_folder": HF_HUB_CACHE,
        "gm_tiny": _built_in(),
    }


def usable_memory() -> int:
    """Returns the bytes that programs may use: of the device that MLX computes on, or of the machine."""
    return _device()["device_memory_bytes"] or all_memory()


def _device() -> dict[str, Any]:
    """Returns the device that MLX computes on, and its memory if that is its own or limited."""
    try:
        import mlx.core as mx
    except ImportError as error:  # a broken installation is what people run this command for
        return {"device": f"none: mlx cannot be imported ({error})", "device_memory_bytes": None}
    facts = mx.device_info()
    if mx.default_device().type == mx.DeviceType.cpu:
        return {"device": f"CPU ({facts.get('device_name', platform.machine())})", "device_memory_bytes": None}
    kind = "Apple GPU" if mx.metal.is_available() else "CUDA"
    # Apple's GPU shares the machine's memory and may use so much of it.
    memory = facts.get("max_recommended_working_set_size", facts.get("total_memory"))
    return {"device": f"{kind} ({facts.get('device_name', 'unnamed')})", "device_memory_bytes": memory}


def _built_in() -> str | None:
    """Returns the folder of the model in the box."""
    from gm_mlx.hub import BUILT_IN, find_model

    try:
        return str(find_model(BUILT_IN))
    except UserError:
        return None
