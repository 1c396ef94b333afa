"""``gm-mlx info``: what a model weighs and needs, or what runs here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx.cli.console import Debug, size
from gm_mlx.cli.system import show_system, system_facts
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.config import ModelConfig
    from gm_mlx.footprint import Footprint

NAMES = {
    "tower": "Vision tower",
    "projector": "Projector",
    "embeddings": "Embeddings, head",
    "attention": "Attention",
    "dense_ffn": "Dense FFNs",
    "experts": "Experts",
    "routers": "Routers",
    "norms": "Norms",
}

# What the paper's Table 3 says of its models (LLaVA-GM; GFLOPs from its text), and why no Gemma can be like that.
PAPER: dict[str, dict[str, Any]] = {
    "llava-gm-2b": {
        "total": 3.3e9,
        "active": 2.2e9,
        "layers": 24,
        "memory_gb": 1.9,
        "gflops": 3623,
        "why": "Gemma-2B has 18 layers, and 2.5 B parameters before any expert is added: more than 2.2 B.",
    },
    "llava-gm-7b": {
        "total": 13.4e9,
        "active": 7.9e9,
        "layers": 32,
        "memory_gb": 4.2,
        "gflops": 7512,
        "why": "Gemma-7B has 28 layers, and 8.5 B parameters before any expert is added: more than 7.9 B.",
    },
}


@dataclass(frozen=True)
class Subject:
    """What is asked about: a model folder, or a preset, which has no files."""

    name: str
    folder: Path | None
    config: ModelConfig


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL|PRESET", help="A model folder, a repository on Hugging Face, or a preset."),
    ] = None,
    system: Annotated[
        bool, typer.Option("--system", help="Say what runs here and on what; the default without a model.")
    ] = False,
    quantize: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Count a preset as quantized by this recipe.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images of the question that is counted.")] = 1,
    tokens: Annotated[int, typer.Option(help="Its text tokens.")] = 64,
    context: Annotated[
        int | None, typer.Option(help="Tokens of question and answer in memory; 512 of answer by default.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Say whether it fits this device, such as iphone-8gb.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a model weighs and needs; without a model, what runs here."""
    if model is None:
        if quantize or device or context:
            raise UserError("name a model or a preset to ask that of; see gm-mlx info --help")
        facts = system_facts()
        print(json.dumps(facts)) if as_json else show_system(facts)
        return
    if system:
        raise UserError(f"--system says nothing of a model; leave out --system or {model}")
    from gm_mlx.devices import DEVICES
    from gm_mlx.footprint import footprint

    if device is not None and device not in DEVICES:
        raise UserError(f"--device: {device!r} is not one of {', '.join(DEVICES)}")
    subject = find_subject(model)
    stored = table = None
    if subject.folder is None:
        table = _recipe_table(subject.config, quantize)
    else:
        if quantize is not None:
            raise UserError(f"--quantize is for presets; {model} has files: run `gm-mlx quantize {model}`")
        from gm_mlx.folder import read_model_folder

        stored = read_model_folder(subject.folder)
    counted = footprint(
        subject.config,
        stored=stored,
        quantization=table,
        images=images,
        text_tokens=tokens,
        context=context,
    )
    if as_json:
        print(json.dumps(_facts(subject, counted, quantize)))
    else:
        _show(subject, counted, quantize, device)


def find_subject(name: str) -> Subject:
    """Finds a model folder, a preset or a repository; a folder wins over a preset, and a preset over a repository."""
    from gm_mlx.config import ModelConfig
    from gm_mlx.hub import BUILT_IN, find_model
    from gm_mlx.presets import PRESETS

    if name in PRESETS and name != BUILT_IN and not os.path.isdir(name):
        return Subject(name, None, PRESETS[name])
    try:
        folder = find_model(name)
    except UserError as error:
        if os.path.exists(name) or "/" in name:
            raise
        raise UserError(f"{error}; presets are {', '.join(PRESETS)}") from None
    return Subject(name, folder, ModelConfig.load(folder))


def _recipe_table(config: ModelConfig, recipe: str | None) -> dict[str, Any] | None:
    if recipe is None:
        return None
    from gm_mlx.quant.recipes import recipe_table

    return recipe_table(config, recipe)


def _facts(subject: Subject, counted: Footprint, recipe: str | None) -> dict[str, Any]:
    """What ``--json`` prints."""
    from gm_mlx.devices import DEVICES

    text = subject.config.text_config
    return {
        "model": subject.name,
        "folder": None if subject.folder is None else str(subject.folder),
        "file_bytes": _file_bytes(subject.folder),
        "recipe": recipe,
        "layers": text.num_hidden_layers,
        "sparse_layers": text.sparse_layers,
        "experts": text.moe.num_experts if text.moe else 0,
        "experts_per_token": text.moe.top_k if text.moe else 0,
        "tokens_per_image": subject.config.num_image_tokens,
        "max_context": text.max_position_embeddings,
        **counted.to_dict(),
        "devices": {
            name: {"usable_bytes": device.usable, "fits": counted.memory.peak <= device.usable}
            for name, device in DEVICES.items()
        },
        "paper": PAPER.get(subject.name) if subject.folder is None else None,
    }


def _file_bytes(folder: Path | None) -> int | None:
    """Bytes of the weight files, headers included."""
    if folder is None:
        return None
    from gm_mlx.weights import weight_files

    return sum(file.stat().st_size for file in weight_files(folder))


def _show(subject: Subject, counted: Footprint, recipe: str | None, device: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console, text = Console(highlight=False), subject.config.text_config
    kind = f"folder {subject.folder}" if subject.folder else f"preset, {recipe or 'float16'}"
    sparse = ""
    if text.moe is not None:
        what = f"{text.moe.num_experts} experts, {text.moe.top_k} per token"
        if text.moe.kind == "evf":
            what = "a language FFN and a vision FFN, 1 per token"
        sparse = f", {len(text.sparse_layers)} with {what}"
    print(f"{subject.name} ({kind})")
    print(
        f"{text.num_hidden_layers} layers of width {text.hidden_size}{sparse}; "
        f"{subject.config.num_image_tokens} tokens per image, context {text.max_position_embeddings}\n"
    )

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("Parameters", "Active", "Size", "Bits"):
        table.add_column(title, justify="right")
    for name, share in counted.components.items():
        if share.total:
            table.add_row(NAMES[name], *_row(share.total, share.active, share.bytes))
    table.add_row("All", *_row(counted.total, counted.active, counted.bytes), style="bold")
    console.print(table)
    print()

    flops, memory = counted.flops, counted.memory
    parts = ", ".join(f"{name} {_giga(getattr(flops, name))}" for name in ("tower", "projector", "decoder", "head"))
    images = f"{counted.images} image{'' if counted.images == 1 else 's'}"
    lines = {
        "Question": f"{images} and {counted.text_tokens} text tokens: {counted.prompt_tokens} tokens",
        "To read it": f"{_giga(flops.prefill)} GFLOPs ({parts})",
        "Per token": f"{_giga(flops.token)} GFLOPs",
        "KV cache": f"{size(counted.kv_bytes_per_token)} per token, {size(memory.kv_cache)} for {counted.context}",
        "Peak memory": f"{size(memory.peak)}, estimated: weights {size(memory.weights)}, "
        f"activations {size(memory.activations)}, runtime {size(memory.runtime)}",
    }
    for label, line in lines.items():
        print(f"{label:12} {line}")
    _show_devices(memory.peak, device)
    if subject.folder is None and subject.name in PAPER:
        _show_paper(counted, text.num_hidden_layers, PAPER[subject.name])


def _row(total: int, active: int, num_bytes: int) -> tuple[str, ...]:
    return _count(total), _count(active), size(num_bytes), f"{8 * num_bytes / total:.2f}"


def _show_devices(peak: int, name: str | None) -> None:
    from gm_mlx.devices import DEVICES

    if name is None:
        fits = [name for name, device in DEVICES.items() if peak <= device.usable]
        print(f"{'Fits':12} {', '.join(fits) or 'none of ' + ', '.join(DEVICES)}")
        return
    device = DEVICES[name]
    verdict = "fits" if peak <= device.usable else "does not fit"
    print(f"{name:12} {verdict}: a program may use {size(device.usable)} of {size(device.memory)} ({device.reason})")


def _show_paper(counted: Footprint, layers: int, paper: dict[str, Any]) -> None:
    """Prints our figures beside the paper's."""
    rows = (
        ("Parameters", _count(counted.total), _count(paper["total"])),
        ("Active", _count(counted.active), _count(paper["active"])),
        ("Layers", str(layers), str(paper["layers"])),
        ("Memory", size(counted.memory.peak), f"{paper['memory_gb']} GB"),
        ("GFLOPs", _giga(counted.flops.prefill), f"{paper['gflops']:,}"),
    )
    print(f"\n{'':12} {'here':>10} {'paper, Table 3':>16}")
    for label, ours, theirs in rows:
        print(f"{label:12} {ours:>10} {theirs:>16}")
    print(f"The paper's sizes cannot be reached with Gemma and four full experts:\n{paper['why']}")


def _count(number: float) -> str:
    """Returns a number of parameters for people."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:#.3g} {name}".replace(". ", " ")
    return str(int(number))


def _giga(flops: float) -> str:
    giga = flops / 1e9
    return f"{giga:,.0f}" if giga >= 100 else f"{giga:.3g}"
