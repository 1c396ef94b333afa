"""Random LoRA adapters as peft writes them, with what they make of their base's weights in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gm_mlx.config import ModelConfig

LAYERS = "language_model.model.layers"
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
NETWORK = ["gate_proj", "up_proj", "down_proj"]
IDS = np.random.default_rng(5).integers(4, 390, 40).tolist()

# What stands before a layer's number in peft's files, by the model that was wrapped.
PREFIXES = {
    "transformers 5": "base_model.model.model.language_model.layers.",
    "transformers 4": "base_model.model.language_model.model.layers.",
    "LLaVA": "base_model.model.model.layers.",
}
DEEPSPEED = {"mlp.experts.": "mlp.deepspeed_moe.experts.deepspeed_experts.", "mlp.gate": "mlp.deepspeed_moe.gate.wg"}

# Patterns of modules.
PARTS = {
    "attention": r"self_attn\..*",
    "values": r"self_attn\.v_proj",
    "dense network": r"mlp\.(gate|up|down)_proj",
    "experts": r"mlp\.experts\..*",
    "router": r"mlp\.gate",
    "everything": r".*",
}


@dataclass
class Adapter:
    """An adapter that is not written yet, and the weights that it makes of its base's."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=lambda: {"peft_type": "LORA", "r": 4, "lora_alpha": 6})
    merged: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, folder: Path, dtype: torch.dtype = torch.float32, suffix: str = "safetensors") -> Path:
        folder.mkdir(parents=True)
        tensors = {name: torch.tensor(array).to(dtype) for name, array in self.tensors.items()}
        save = save_file if suffix == "safetensors" else torch.save
        save(tensors, folder / f"adapter_model.{suffix}")
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder


def modules(config: ModelConfig) -> list[str]:
    """The decoder's linears, as "<layer>.<name>"; of experts each its own."""
    found = []
    for i in range(config.text_config.num_hidden_layers):
        found += [f"{i}.{name}" for name in ATTENTION]
        if i in config.text_config.sparse_layers:
            assert config.text_config.moe is not None
            experts = range(config.text_config.moe.num_experts)
            found += [f"{i}.mlp.gate", *(f"{i}.mlp.experts.{e}.{name}" for e in experts for name in NETWORK)]
        else:
            found += [f"{i}.mlp.{name}" for name in NETWORK]
    return found


def draw(
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    pattern: str,
    *,
    layout: str = "LLaVA",
    rank: Callable[[str], int] = lambda module: 4,
    strength: Callable[[str, int], float] = lambda module, rank: 6 / rank,
    power: float = 1.0,
    seed: int = 0,
    **settings: Any,
) -> Adapter:
    """A random adapter for the modules that a pattern finds, by the names of a layout.

    ``strength`` says what its config should come to; ``power`` is the user's own scale.
    """
    random = np.random.default_rng(seed)
    adapter = Adapter(merged=dict(weights))
    adapter.config |= settings
    for module in modules(config):
        if not re.fullmatch(r"\d+\." + pattern, module):
            continue
        name, at = f"{LAYERS}.{module}.weight", ()
        if expert := re.fullmatch(r"(\d+)\.mlp\.experts\.(\d+)\.(\w+)", module):
            name, at = f"{LAYERS}.{expert[1]}.mlp.switch_mlp.{expert[3]}.weight", (int(expert[2]),)
        old = adapter.merged.get(name)
        if old is None:  # a router of low rank
            u, v = (np.float64(weights[f"{LAYERS}.{module}.{part}"]) for part in "uv")
            old = (u @ v).T
        r = rank(module)
        out, size = old[at].shape
        down, up = random.normal(size=(r, size)) * size**-0.5 / 2, random.normal(size=(out, r)) * r**-0.5
        down, up = down.astype(np.float32), up.astype(np.float32)
        merged = np.array(old, np.float64)
        merged[at] += power * strength(module, r) * (np.float64(up) @ np.float64(down))
        adapter.merged[name] = merged
        inside = module
        if layout == "LLaVA":
            for ours, theirs in DEEPSPEED.items():
                inside = re.sub(rf"\.{re.escape(ours)}(?!_)", f".{theirs}", inside)
        adapter.tensors |= {
            f"{PREFIXES[layout]}{inside}.lora_{kind}.weight": x for kind, x in zip("AB", (down, up), strict=True)
        }
    assert adapter.tensors
    return adapter
