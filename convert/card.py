"""The model card of a converted model: what it is, where it comes from, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gm_mlx import __version__
from gm_mlx.config import ModelConfig
from gm_mlx.inventory import model_layers
from gm_mlx.train.record import record_text

# Lines of a source's card that hold for what is made from it too.
KEPT = re.compile(r"(?:license|license_name|license_link|language): *\S.*")
TAGS = ("vision-language", "visual-question-answering")


def num_parameters(config: ModelConfig) -> tuple[int, int]:
    """All parameters of a model, and those that work on a token."""
    layers = model_layers(config)
    return sum(layer.total for layer in layers), sum(layer.active for layer in layers)


def count(number: int) -> str:
    """A number of parameters for people."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


FOLDER_USE = """\
```
pip install gm-mlx
gm-mlx chat --model {name} --image photo.jpg --prompt "What is this?"
```

`--model` takes this folder's path, or the name of the repository that it lies in."""
GGUF_USE = """\
```
llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --image photo.jpg -p "What is this?"
```

Any program that is built on llama.cpp and takes a vision file (`mmproj`) runs it, and so does gm-mlx:
`pip install 'gm-mlx[gguf]'`, then `gm-mlx chat --model {name}/model.gguf --image photo.jpg`."""


def model_card(
    name: str,
    config: ModelConfig,
    gm: Mapping[str, Any],
    folder: Path | None = None,
    *,
    library: str = "gm-mlx",
    use: str = FOLDER_USE,
) -> str:
    """The text of README.md, with Hugging Face's metadata on top.

    Args:
        name: the model's name.
        config: its config.
        gm: what its ``gm.json`` says.
        folder: the source, whose own card tells licence and language; or None.
        library: what the files are for, by Hugging Face's name.
        use: how to run it, with ``{name}`` where the model's name belongs.
    """
    text, moe, vision = config.text_config, config.text_config.moe, config.vision_config
    sources = gm.get("sources", {})
    checkpoint = sources.get("checkpoint", {})
    total, active = num_parameters(config)
    kind, layers = "dense", f"{text.num_hidden_layers}, without experts"
    if moe and text.sparse_layers:
        kind = "sparse"
        sparse = len(text.sparse_layers)
        what = f"{moe.num_experts} experts, {moe.top_k} per token"
        if moe.kind == "evf":
            what = "a language FFN and a vision FFN, one of them per token"
        layers = f"{text.num_hidden_layers}, {sparse} of them with {what}"
    rows = {
        "Parameters": f"{count(total)}, of which {count(active)} work on a token",
        "Decoder layers": layers,
        "Vision tower": f"{'CLIP' if vision.is_clip else 'SigLIP'}, {vision.image_size} pixels, "
        f"{config.num_image_tokens} tokens per image",
        "Weights": gm.get("quantization", {}).get("summary") or gm.get("dtype") or "as in the source",
        "Chat template": gm.get("template"),
        "Images": gm.get("image_mode"),
        "Routers": gm.get("routers") and f"of rank {gm['routers']['rank']}",
        "Experts from": gm.get("upcycle", {}).get("from"),
    }
    training = gm.get("training")
    origin = f"Converted from {_link(checkpoint)} by"
    if training:
        origin = f"Trained from `{training['base']}` by"
    elif "preset" in gm and not sources:
        origin = f"Its weights are random, in the shape of {gm['preset']}: it talks nonsense. Made by"
    parts = [
        "\n".join(["---", *_metadata(checkpoint, folder, library), "---"]),
        f"# {name}",
        f"A {kind} vision-language model for gm-mlx. {origin} gm-mlx {__version__}.",
        "\n".join(["|  |  |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]),
        "## Use",
        use.format(name=name),
    ]
    if training:
        learnt = ", ".join(training["trains"]).replace("_", " ")
        parts += [
            "## Training",
            f"Stage {training['stage']} of the recipe {training['recipe']}; {learnt} learnt. {record_text(training)}",
        ]
    if notes := gm.get("notes"):
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    if sources:
        parts += ["## Sources", "\n".join(_source_lines(sources))]
    return "\n\n".join(parts) + "\n"


def licence_of(folder: Path | None) -> str | None:
    """The licence that a source's card names, or None."""
    lines = (line.partition(":") for line in _kept_metadata(folder))
    return next((value.strip() for key, _, value in lines if key == "license"), None)


def _metadata(checkpoint: Mapping[str, Any], folder: Path | None, library: str) -> list[str]:
    lines = [f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    if "revision" in checkpoint:
        lines.append(f"base_model: {checkpoint['name']}")
    return [*lines, *_kept_metadata(folder), "tags:", *(f"- {tag}" for tag in (library, *TAGS))]


def _kept_metadata(folder: Path | None) -> list[str]:
    """Licence and language from between the first two lines of dashes of the source's card."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    return [line for line in parts[1].splitlines() if KEPT.fullmatch(line)]


def _link(source: Mapping[str, Any]) -> str:
    name = source.get("name", "a checkpoint")
    return f"[{name}](https://huggingface.co/{name})" if "revision" in source else f"`{name}`"


def _source_lines(sources: Mapping[str, Any]) -> list[str]:
    lines = ["| source | file | SHA-256 |", "|---|---|---|"]
    for role, source in sources.items():
        title = f"{role}: {source['name']}" + (f" at {source['revision'][:12]}" if "revision" in source else "")
        lines += [f"| {title} | {file} | `{digest}` |" for file, digest in source["sha256"].items()]
    return lines
