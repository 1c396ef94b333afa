"""Every import from mlx-lm that is not in its public ``__all__``.

These names moved between minor versions before, so mlx-lm is pinned and ``tests/test_mlx_lm_contract.py`` checks each
of them. Importing mlx-lm costs about a second and lowers RLIMIT_NOFILE: import this module only where a model runs.
"""

from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

__all__ = [
    "KVCache",
    "QuantizedKVCache",
    "QuantizedSwitchLinear",
    "RotatingKVCache",
    "SwitchGLU",
    "SwitchLinear",
    "SwitchMLP",
    "apply_min_p",
    "apply_top_k",
    "apply_top_p",
    "create_attention_mask",
    "make_logits_processors",
    "scaled_dot_product_attention",
]
