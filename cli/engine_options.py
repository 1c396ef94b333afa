"""The options that name a model and say how it runs, for the commands that ask it questions."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from gm_mlx.cli.console import with_strength


class KVBits(StrEnum):
    """The choices of ``--kv-bits``."""

    FOUR = "4"
    EIGHT = "8"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH|REPO",
        help="A model folder, a GGUF file or a Hugging Face repository. [default: gm-tiny]",
    ),
]
MMProj = Annotated[
    str | None,
    typer.Option(
        "--mmproj", metavar="FILE", help="The vision model of a GGUF file. [default: one beside it that fits]"
    ),
]
GGUFFile = Annotated[
    str | None,
    typer.Option("--gguf-file", metavar="PATTERN", help="Which GGUF file of a folder or repository, as Q8_0."),
]
CacheBits = Annotated[KVBits | None, typer.Option(help="Keep keys and values in so many bits, to save memory.")]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="Of a GGUF file: processors. [default: all cores]")
]
GPULayers = Annotated[
    int | None,
    typer.Option("--n-gpu-layers", metavar="N", help="Of a GGUF file: layers for the GPU. [default: all]"),
]
LoRA = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="FILE[=SCALE]", help="Of a GGUF file: a LoRA adapter and its strength; may be repeated."
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER[=WEIGHT]",
        help="Of a model folder: a LoRA adapter and how strong it is; may be repeated.",
    ),
]


def engine_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``vlm.open_engine`` is told, of a command's parameters; what was not given is left out."""
    bits, lora, adapter = parameters["kv_bits"], parameters["lora"], parameters["adapter"]
    options = {
        "mmproj": parameters["mmproj"],
        "gguf_file": parameters["gguf_file"],
        "kv_bits": bits and int(bits),
        "max_kv_size": parameters.get("max_kv_size"),
        "prefill_chunk": parameters.get("prefill_chunk"),
        "n_ctx": parameters.get("context"),
        "threads": parameters["threads"],
        "gpu_layers": parameters["n_gpu_layers"],
        "lora": [with_strength(text) for text in lora] if lora else None,
        "repack": parameters.get("repack"),
        "adapters": [with_strength(text) for text in adapter] if adapter else None,
        "show_log": parameters["debug"] or None,
    }
    return {key: value for key, value in options.items() if value is not None}
