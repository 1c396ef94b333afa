"""The checkpoint layouts that can be read, each a module of tables."""

from __future__ import annotations

from gm_mlx.convert.layouts.eve import EVE
from gm_mlx.convert.layouts.hf_llava import HF_LLAVA
from gm_mlx.convert.layouts.llava import LLAVA
from gm_mlx.convert.layouts.moe_llava import MOE_LLAVA

# Eve's checkpoints have MoE-LLaVA's names too, and those may have some of LLaVA's.
LAYOUTS = (HF_LLAVA, EVE, MOE_LLAVA, LLAVA)
