"""The only door to llama.cpp's library: the names that are used of llama-cpp-python, and what the library says.

The binding is a thin layer of ctypes over llama.cpp's C interface, and much of that interface changes from month to
month. So what is used is listed here, name by name, and a version that lacks one is refused with the remedy.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gm_mlx.errors import UserError

INSTALL = "pip install 'gm-mlx[gguf]'"
SHOW_LOG = "GM_MLX_LLAMA_LOG"  # environment variable: print all that llama.cpp says

NAMES = {
    "llama_cpp.llama_cpp": (
        "ggml_abort_callback", "llama_log_callback", "llama_progress_callback",
        "llama_batch_free", "llama_batch_init", "llama_token", "llama_pos", "llama_logit_bias",
        "llama_model_kv_override",
        "LLAMA_KV_OVERRIDE_TYPE_BOOL", "LLAMA_KV_OVERRIDE_TYPE_INT", "LLAMA_KV_OVERRIDE_TYPE_STR",
        "LLAMA_FLASH_ATTN_TYPE_AUTO", "LLAMA_FLASH_ATTN_TYPE_ENABLED",
        "GGML_TYPE_Q4_0", "GGML_TYPE_Q8_0", "LLAMA_TOKEN_ATTR_UNKNOWN", "LLAMA_TOKEN_ATTR_CONTROL",
        "llama_backend_init", "llama_log_set", "llama_supports_gpu_offload",
        "llama_model_default_params", "llama_model_load_from_file", "llama_model_free", "llama_model_get_vocab",
        "llama_model_n_ctx_train", "llama_model_n_embd_inp", "llama_model_n_swa", "llama_model_has_decoder",
        "llama_model_has_encoder",
        "llama_model_quantize_default_params", "llama_model_tensor_override", "llama_model_imatrix_data",
        "llama_model_quantize",
        "llama_context_default_params", "llama_init_from_model", "llama_free", "llama_decode",
        "llama_get_logits_ith", "llama_set_abort_callback",
        "llama_adapter_lora_init", "llama_set_adapters_lora", "llama_adapter_lora_p_ctypes",
        "llama_get_memory", "llama_memory_clear", "llama_memory_seq_rm", "llama_memory_seq_pos_min",
        "llama_vocab_n_tokens", "llama_vocab_get_attr", "llama_vocab_is_eog", "llama_vocab_bos",
        "llama_vocab_eos", "llama_vocab_pad", "llama_vocab_get_add_bos", "llama_tokenize", "llama_token_to_piece",
        "llama_sampler_chain_default_params", "llama_sampler_chain_init", "llama_sampler_chain_add",
        "llama_sampler_init_logit_bias", "llama_sampler_init_penalties", "llama_sampler_init_top_k",
        "llama_sampler_init_top_p", "llama_sampler_init_min_p", "llama_sampler_init_temp", "llama_sampler_init_dist",
        "llama_sampler_init_greedy", "llama_sampler_accept", "llama_sampler_sample", "llama_sampler_free",
    ),
    "llama_cpp.mtmd_cpp": (
        "_libmtmd", "mtmd_input_part", "mtmd_input_text", "mtmd_helper_post_decode_callback",
        "MTMD_INPUT_CHUNK_TYPE_TEXT",
        "mtmd_context_params_default", "mtmd_init_from_file", "mtmd_free", "mtmd_support_vision",
        "mtmd_decode_use_non_causal", "mtmd_bitmap_init", "mtmd_bitmap_set_id", "mtmd_bitmap_free",
        "mtmd_input_chunks_init", "mtmd_input_chunks_size", "mtmd_input_chunks_get", "mtmd_input_chunks_free",
        "mtmd_input_chunk_get_type", "mtmd_input_chunk_get_tokens_text", "mtmd_input_chunk_get_n_tokens",
        "mtmd_input_chunk_get_n_pos", "mtmd_input_chunk_get_id", "mtmd_tokenize_from_parts", "mtmd_encode_chunk",
        "mtmd_get_output_embd", "mtmd_helper_decode_image_chunk", "mtmd_helper_log_set",
    ),
}  # fmt: skip

# Levels of ggml's log.
WARNING, ERROR, CONTINUED = 3, 4, 5
KEPT_ERRORS = 20


class Log:
    """What llama.cpp says: silent, unless somebody wants to see it, with the last errors kept for messages of ours."""

    def __init__(self) -> None:
        self.shown = bool(os.environ.get(SHOW_LOG))
        self._errors: list[str] = []
        self._level = 0

    def clear(self) -> None:
        """Forget errors; called before something is tried."""
        self._errors.clear()

    def reason(self) -> str:
        """The first error since ``clear``, which is the cause of those after it; without the C++ function's name."""
        text = self._errors[0] if self._errors else "no reason given"
        text = re.sub(r"^\w+: (error( loading model)?: )?", "", " ".join(text.split()))
        return re.sub(r"^(error loading model( \w+)?|error): ", "", text)

    def hear(self, level: int, text: bytes) -> None:
        """Take what the library says."""
        line = text.decode("utf-8", errors="replace")
        if self.shown:
            print(line, end="", file=sys.stderr, flush=True)
        self._level = self._level if level == CONTINUED else level
        if self._level != ERROR:
            return
        if level == CONTINUED and self._errors:
            self._errors[-1] += line
        elif len(self._errors) < KEPT_ERRORS and line.strip():
            self._errors.append(line)


LOG = Log()


@cache
def library() -> Any:
    """The functions, types and constants of ``NAMES`` by name, with llama.cpp set up and its log in ``LOG``.

    Raises:
        UserError: llama-cpp-python is not installed, cannot be loaded, or is too old or too new.
    """
    try:
        modules = {name: import_module(name) for name in NAMES}
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llama_cpp":
            raise
        raise UserError(f"GGUF files need llama.cpp, which is not installed here; {INSTALL}") from None
    except (OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"llama-cpp-python cannot be loaded ({reason}); install it again: {INSTALL}") from None
    pairs = [(module, name) for module, names in NAMES.items() for name in names]
    lacking = [f"{module}.{name}" for module, name in pairs if not hasattr(modules[module], name)]
    if lacking:
        raise UserError(
            f"llama-cpp-python {_version()} has no {lacking[0]}, which is needed here; install a version that gm-mlx "
            f"was tested with: {INSTALL}"
        )
    found = SimpleNamespace(**{name: getattr(modules[module], name) for module, name in pairs})
    # The library calls it for as long as the process lives, so it must never be collected.
    found.listener = found.llama_log_callback(lambda level, text, data: LOG.hear(level, text))
    found.llama_log_set(found.listener, None)
    found.mtmd_helper_log_set(found.listener, None)
    found.llama_backend_init()
    return found


def library_file() -> Path:
    """The shared library that computes image features."""
    return Path(library()._libmtmd._name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "of an unknown version"
