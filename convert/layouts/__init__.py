"""The checkpoint layouts that can be read, each a module of tables."""

from __future__ import annotations

from gm_mlx.convert.layouts.hf_llava import HF_LLAVA
from gm_mlx.convert.layouts.llava import LLAVA
from gm_mlx.convert.layouts.moe_llava import MOE_LLAVA

# MoE-LLaVA's marks come before LLaVA's: its checkpoints may have some of LLaVA's names too.
LAYOUTS = (HF_LLAVA, MOE_LLAVA, LLAVA)
