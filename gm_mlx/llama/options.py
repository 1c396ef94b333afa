"""What the engine on llama.cpp can be asked for."""

from __future__ import annotations

from gm_mlx.errors import UserError


def check_options(
    n_ctx: int | None,
    threads: int | None,
    gpu_layers: int | None,
    kv_bits: int | None,
    max_kv_size: int | None,
    prefill_chunk: int,
) -> None:
    """Refuse options out of range, and those that llama.cpp does not have; raises ``UserError``."""
    if max_kv_size is not None:
        raise UserError("max_kv_size: llama.cpp's cache forgets nothing; bound it with --context (n_ctx) instead")
    allowed = {
        "n_ctx": (n_ctx is None or n_ctx >= 16, n_ctx, "16 or more"),
        "threads": (threads is None or 1 <= threads <= 512, threads, "between 1 and 512"),
        "gpu_layers": (gpu_layers is None or gpu_layers >= 0, gpu_layers, "0 or more"),
        "kv_bits": (kv_bits in (None, 4, 8), kv_bits, "4 or 8"),
        "prefill_chunk": (1 <= prefill_chunk <= 1 << 16, prefill_chunk, "1 or more and at most 65536"),
    }
    for name, (valid, value, rule) in allowed.items():
        if not valid:
            raise UserError(f"{name}: {value} is not {rule}")
