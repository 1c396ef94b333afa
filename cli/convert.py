"""``gm-mlx convert``: a checkpoint, a model folder or a preset, written as a model folder or for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from gm_mlx.cli.console import Debug, Progress, note, parse_size, size
from gm_mlx.cli.conversion import Opened, agreement, change, check_recipe, open_source, refuse
from gm_mlx.errors import UserError

SAMPLES = 8  # on which a split model is measured
WEIGHTS = ("*.safetensors", "*.gguf")


class Dtype(StrEnum):
    """The choices of ``--dtype``."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class To(StrEnum):
    """The choices of ``--to``."""

    MLX = "mlx"
    GGUF = "gguf"
    GGUF_LORA = "gguf-lora"


class ClipLayout(StrEnum):
    """The choices of ``--clip-layout``."""

    FIRST = "cls_first"
    LAST = "cls_last"


def convert(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A checkpoint's folder, a model folder, or a repository with either."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="The folder to write; with --to gguf-lora, the file."),
    ] = None,
    to: Annotated[
        To,
        typer.Option(help="Write a model folder, files for llama.cpp, or a LoRA adapter for llama.cpp's --lora."),
    ] = To.MLX,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Fewer bits: q4, q8, q4-all, q3-experts or mxfp4. For gguf also llama.cpp's types, such as Q4_K_M.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For gguf: what `gm-mlx imatrix` has measured.")
    ] = None,
    clip_layout: Annotated[
        ClipLayout | None,
        typer.Option(
            help="For gguf: where llama.cpp expects the position of CLIP's class token. [default: found by trying]"
        ),
    ] = None,
    upcycle: Annotated[
        str | None,
        typer.Option(
            metavar="ExK[@MODE]",
            help="Make E experts of each dense FFN, K per token, in the layers of MODE: sparse (every other; the "
            "default), dense (all), first_half or second_half. `evf` adds a vision FFN instead, as in Eve.",
        ),
    ] = None,
    upcycle_split: Annotated[
        bool, typer.Option("--upcycle-split", help="Split each FFN into its experts, instead of copying it.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Images or prompts that --upcycle-split is measured on. [default: built in]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="How many of them; 0 measures nothing.")] = SAMPLES,
    router_rank: Annotated[int | None, typer.Option(metavar="R", help="Give the routers this rank.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of all weights that are not quantized. [default: the source's]")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(metavar="PATH|REPO", help="The vision tower, if the source has none or another.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PATH|REPO", help="The language model of a LoRA adapter or a projector.")
    ] = None,
    new_projector: Annotated[
        bool,
        typer.Option(
            "--new-projector", help="Put a projector with random weights between a language model and --vision."
        ),
    ] = False,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="The chat template, such as gemma or v1. [default: the source's]")
    ] = None,
    scale_image_features: Annotated[
        bool | None,
        typer.Option(
            "--scale-image-features/--no-scale-image-features",
            help="For Gemma: whether image features are scaled like text. [default: as its code did]",
        ),
    ] = None,
    image_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens per image, by averaging neighbours, such as 144. [default: as it is]"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of SOURCE, with --random: a preset's shape.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights for --preset.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the random weights. [default: 0]")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder.")] = False,
    upload: Annotated[
        str | None, typer.Option(metavar="REPO", help="Put the result on Hugging Face, into a private repository.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --upload a public one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Convert a PyTorch checkpoint into a model folder, or into files for llama.cpp."""
    if out is None:
        raise UserError("name the model folder to write with -o OUT")
    if (source is None) == (preset is None):
        raise UserError("name a SOURCE to convert, or a --preset to fill with --random weights; one of the two")
    if (preset is not None) != random:
        raise UserError("--preset and --random need each other: a preset is a shape without weights")
    if seed is not None and not random:
        raise UserError("--seed is of random weights; add --random, or leave it out")
    if preset is not None and template is not None:
        raise UserError("--template: a preset has that of its tokenizer; leave it out")
    checkpoint_only = {
        "--vision": vision,
        "--base": base,
        "--scale-image-features": scale_image_features,
        "--new-projector": new_projector or None,
    }
    if preset is not None:
        refuse(checkpoint_only, "with --preset")
    if new_projector and (vision is None or base is not None):
        raise UserError("--new-projector joins SOURCE, a language model, and the tower of --vision; give these two")
    if upcycle_split and upcycle is None:
        raise UserError("--upcycle-split says how experts are made; say how many with --upcycle, such as 4x2")
    if calibration is not None and not upcycle_split:
        raise UserError("--calibration is what --upcycle-split is measured on; add that, or leave it out")
    if public and upload is None:
        raise UserError("--public is about the repository of --upload; name one")
    max_shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    if to is not To.GGUF:
        gguf_only = {"--imatrix": imatrix, "--clip-layout": clip_layout}
        if given := [name for name, value in gguf_only.items() if value is not None]:
            raise UserError(f"{given[0]} is about files for llama.cpp; add --to gguf, or leave it out")
    if to is To.GGUF_LORA:
        not_lora = {
            "--quantize": quantize, "--upcycle": upcycle, "--router-rank": router_rank, "--preset": preset,
            "--vision": vision, "--template": template, "--image-tokens": image_tokens, "--upload": upload,
            "--scale-image-features": scale_image_features, "--new-projector": new_projector or None,
        }  # fmt: skip
        _write_lora(source, base, out, not_lora, dtype=dtype, force=force, as_json=as_json)
        return
    gguf = None
    if to is To.GGUF:
        if dtype is not None:
            raise UserError("--dtype is of a model folder; a GGUF file has --quantize F16, BF16 or F32")
        from gm_mlx.cli.gguf_output import check_expressible, plan_gguf

        gguf = plan_gguf(quantize, imatrix, clip_layout.value if clip_layout else None)
    else:
        check_recipe(quantize)
    # Heavy imports only now: a misspelt option is told at once.
    from gm_mlx.convert.card import count, model_card, num_parameters
    from gm_mlx.convert.provenance import sha256, source_files, sources
    from gm_mlx.convert.source import licences
    from gm_mlx.convert.upload import check_upload
    from gm_mlx.convert.upload import upload as upload_folder
    from gm_mlx.folder import write_model_folder
    from gm_mlx.new_folder import check_out

    moe = None
    if upcycle is not None:
        from gm_mlx.upcycle import parse_upcycle

        moe = parse_upcycle(upcycle)
    check_out(out, force=force)
    if upload is not None:
        check_upload(upload)

    began = perf_counter()
    progress = Progress()
    if preset is not None:
        from gm_mlx.convert.random_model import random_model

        opened = Opened(random_model(preset, seed or 0, dtype), preset, {}, {})
    else:
        assert source is not None
        opened = open_source(source, vision, base, template, scale_image_features, new_projector)
        check_out(out, force=force, sources=opened.folders.values())
    if image_tokens is not None:
        from gm_mlx.convert.image_tokens import set_image_tokens

        opened.translation = set_image_tokens(opened.translation, image_tokens)
    made = opened.translation
    with progress.waiting("prepare"):
        changed = change(opened, moe, upcycle_split, router_rank, None if gguf else quantize, dtype)
    if gguf is not None:
        check_expressible(changed.config)
    agreed = None
    if upcycle_split and samples:
        with progress.waiting("reference"):
            agreed = agreement(made, changed, calibration, samples, progress)
        changed.gm["upcycle"]["agreement"] = agreed.to_dict()
    for line in changed.notes:
        note(line)
    with progress.waiting("hash"):
        hashes = sha256(source_files(opened.folders.values(), made.files), progress)
        changed.gm["sources"] = sources(opened.names, opened.folders, hashes)
    with progress.waiting("write"):
        if gguf is not None:
            from gm_mlx.cli.gguf_output import write_gguf_form

            more = write_gguf_form(out, opened, changed, gguf, force=force, progress=progress)
        else:
            more = []
            write_model_folder(
                out,
                changed.config,
                changed.tensors,
                processor=made.processor,
                gm=changed.gm,
                card=model_card(out.resolve().name, changed.config, changed.gm, opened.folders.get("checkpoint")),
                quantization=changed.table,
                dtype=changed.dtype,
                force=force,
                max_shard_bytes=max_shard_bytes,
                extra_files=licences(*opened.folders.values()),
                progress=progress,
            )
    for line in more:
        note(line)
    url = upload_folder(out, upload, public=public) if upload is not None else None

    total, active = num_parameters(changed.config)
    facts = {
        "out": str(out),
        "source": opened.name,
        "bytes": sum(file.stat().st_size for pattern in WEIGHTS for file in out.glob(pattern)),
        "parameters": total,
        "active_parameters": active,
        "recipe": quantize,
        "routers": changed.gm.get("routers"),
        "upcycle": changed.gm.get("upcycle"),
        "notes": changed.notes + more,
        "seconds": round(perf_counter() - began, 2),
        "url": url,
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{out}: {size(facts['bytes'])}, {8 * facts['bytes'] / total:.2f} bits per weight, {facts['seconds']:.0f} s")
    print(f"{count(total)} parameters, of which {count(active)} work on a token")
    if agreed is not None:
        print(
            f"against the dense model, on {samples} prompts: KL divergence {agreed.kl:.3g} nats, the same next token "
            f"{agreed.top1:.1%}"
        )
    if url:
        print(url)
    model = out / "model.gguf" if gguf else out
    print(f'try it: gm-mlx chat --model {model} --image FILE --prompt "What is this?"')


def _write_lora(
    adapter: str | None,
    base: str | None,
    out: Path,
    refused: Mapping[str, object],
    *,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """``--to gguf-lora``: a LoRA adapter for a GGUF file of its base."""
    if given := [name for name, value in refused.items() if value is not None]:
        raise UserError(f"{given[0]} is about models; leave it out with --to gguf-lora")
    if adapter is None or base is None:
        raise UserError("--to gguf-lora needs the adapter's folder as SOURCE, and --base with the model that it is for")
    from gm_mlx.convert.to_gguf.lora import convert_adapter
    from gm_mlx.hub import BUILT_IN, find_checkpoint, find_model

    under = Path(base) if base.endswith(".gguf") else find_model() if base == BUILT_IN else find_checkpoint(base)
    progress = Progress()
    with progress.waiting("write"):
        notes = convert_adapter(find_checkpoint(adapter), under, out, dtype=dtype, force=force, progress=progress)
    for line in notes:
        note(line)
    facts = {"out": str(out), "adapter": adapter, "base": base, "bytes": out.stat().st_size, "notes": notes}
    print(json.dumps(facts) if as_json else f"{out}: {size(facts['bytes'])}")
