"""The card of an adapter: what it is for, how large it is, how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gm_mlx import __version__
from gm_mlx.lora.attach import Part

USE = """\
```
gm-mlx chat --model {base} --adapter {name} --image photo.jpg
gm-mlx fuse {base} {name} -o fused-model
```

The first uses it beside the model, the second merges it into the weights."""
GGUF_USE = """\
With a GGUF file of the model, it is used as a file of its own:

```
gm-mlx convert {name} --to gguf-lora --base model.gguf -o {name}.gguf
gm-mlx chat --model model.gguf --lora {name}.gguf --image photo.jpg
```"""
FOR_GGUF = {"attention", "dense_ffn", "experts", "routers"}  # what llama.cpp has LoRA for


def adapter_card(name: str, base: str, config: Mapping[str, Any], parts: Iterable[Part], about: str = "") -> str:
    """The text of README.md, with Hugging Face's metadata on top.

    Args:
        name: the adapter's name.
        base: the name of the model that it is for.
        config: its ``adapter_config.json``.
        parts: what it has for each component.
        about: of its training, for a section of its own.
    """
    parts = list(parts)
    kind = "DoRA" if config["use_dora"] else "LoRA"
    scale = "alpha / sqrt(rank)" if config["use_rslora"] else "alpha / rank"
    rows = [
        f"| {part.component} | {part.matrices} | {', '.join(map(str, part.ranks))} | {part.parameters:,} |"
        for part in parts
    ]
    # A folder on somebody's disk is no model that the hub knows.
    metadata = [
        "library_name: gm-mlx",
        *([f"base_model: {base}"] if "/" in base else []),
        "pipeline_tag: image-text-to-text",
    ]
    sections = [
        "\n".join(["---", *metadata, "tags:", "- gm-mlx", "- lora", "---"]),
        f"# {name}",
        f"A {kind} adapter for {base}, made by gm-mlx {__version__}; alpha is {config['lora_alpha']:g}, and B A is "
        f"multiplied by {scale}.",
        "\n".join(["| part | matrices | rank | parameters |", "|---|---|---|---|", *rows]),
        *(["## Training", about] if about else []),
        "## Use",
        USE.format(name=name, base=base),
    ]
    if FOR_GGUF.issuperset(part.component for part in parts) and not config["use_dora"]:
        sections.append(GGUF_USE.format(name=name))
    return "\n\n".join(sections) + "\n"
