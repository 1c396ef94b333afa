"""``gm-mlx convert``: a checkpoint, a model folder or a preset, written as a model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx import __version__
from gm_mlx.cli.console import Debug, Progress, note, parse_size, size
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from gm_mlx.config import ModelConfig, MoEConfig
    from gm_mlx.convert.translate import Translation
    from gm_mlx.quant.evaluate import Agreement
    from gm_mlx.tensors import Tensor


SAMPLES = 8  # on which a split model is measured


class Dtype(StrEnum):
    """The choices of ``--dtype``."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass
class Opened:
    """A model that is not written yet.

    Attributes:
        translation: the model.
        name: what the user called it.
        folders: where its files are, by role: "checkpoint", "vision", "base".
        names: what each role's folder was called.
    """

    translation: Translation
    name: str
    folders: dict[str, Path]
    names: dict[str, str]


@dataclass
class Changed:
    """A model as it is to be written; see ``write_model_folder``."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    table: dict[str, Any] | None
    dtype: str | None
    gm: dict[str, Any]
    notes: list[str]


def convert(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A checkpoint's folder, a model folder, or a repository with either."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="The model folder to write.")] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Fewer bits: q4, q8, q4-all, q3-experts or mxfp4.")
    ] = None,
    upcycle: Annotated[
        str | None,
        typer.Option(
            metavar="ExK[@MODE]",
            help="Make E experts of each dense FFN, K per token, in the layers of MODE: sparse (every other; the "
            "default), dense (all), first_half or second_half.",
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
    """Convert a PyTorch checkpoint into a model folder."""
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
    checkpoint_only = {"--vision": vision, "--base": base, "--scale-image-features": scale_image_features}
    if preset is not None:
        _refuse(checkpoint_only, "with --preset")
    if upcycle_split and upcycle is None:
        raise UserError("--upcycle-split says how experts are made; say how many with --upcycle, such as 4x2")
    if calibration is not None and not upcycle_split:
        raise UserError("--calibration is what --upcycle-split is measured on; add that, or leave it out")
    if public and upload is None:
        raise UserError("--public is about the repository of --upload; name one")
    max_shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    _check_recipe(quantize)
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
        from gm_mlx.convert.upcycle import parse_upcycle

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
        opened = _open(source, vision, base, template, scale_image_features)
        check_out(out, force=force, sources=opened.folders.values())
    if image_tokens is not None:
        from gm_mlx.convert.image_tokens import set_image_tokens

        opened.translation = set_image_tokens(opened.translation, image_tokens)
    made = opened.translation
    with progress.waiting("prepare"):
        changed = _change(opened, moe, upcycle_split, router_rank, quantize, dtype)
    agreement = None
    if upcycle_split and samples:
        with progress.waiting("reference"):
            agreement = _agreement(made, changed, calibration, samples, progress)
        changed.gm["upcycle"]["agreement"] = agreement.to_dict()
    for line in changed.notes:
        note(line)
    with progress.waiting("hash"):
        hashes = sha256(source_files(opened.folders.values(), made.files), progress)
        changed.gm["sources"] = sources(opened.names, opened.folders, hashes)
    with progress.waiting("write"):
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
    url = upload_folder(out, upload, public=public) if upload is not None else None

    total, active = num_parameters(changed.config)
    facts = {
        "out": str(out),
        "source": opened.name,
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "parameters": total,
        "active_parameters": active,
        "recipe": quantize,
        "routers": changed.gm.get("routers"),
        "upcycle": changed.gm.get("upcycle"),
        "notes": changed.notes,
        "seconds": round(perf_counter() - began, 2),
        "url": url,
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{out}: {size(facts['bytes'])}, {8 * facts['bytes'] / total:.2f} bits per weight, {facts['seconds']:.0f} s")
    print(f"{count(total)} parameters, of which {count(active)} work on a token")
    if agreement is not None:
        print(
            f"against the dense model, on {samples} prompts: KL divergence {agreement.kl:.3g} nats, the same next "
            f"token {agreement.top1:.1%}"
        )
    if url:
        print(url)
    print(f'try it: gm-mlx chat --model {out} --image FILE --prompt "What is this?"')


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """Refuses options that have been given where they have no meaning."""
    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{given[0]} is about PyTorch checkpoints; leave it out {why}")


def _check_recipe(name: str | None) -> None:
    if name is None:
        return
    from gm_mlx.quant.recipes import find_recipe

    if find_recipe(name).calibrated:
        raise UserError(
            f"--quantize {name}: looks at calibration data; convert without it first, and then run `gm-mlx quantize "
            f"OUT -o OUT2 --recipe {name}`"
        )


def _open(
    source: str, vision: str | None, base: str | None, template: str | None, scale_image_features: bool | None
) -> Opened:
    """Finds a checkpoint or a model folder, and what it lacks."""
    from gm_mlx.convert.source import is_model_folder, reopen
    from gm_mlx.hub import BUILT_IN, find_checkpoint, find_model

    folder = find_model() if source == BUILT_IN and not Path(source).is_dir() else find_checkpoint(source)
    if is_model_folder(folder):
        checkpoint_only = {"--vision": vision, "--base": base, "--scale-image-features": scale_image_features}
        _refuse(checkpoint_only, f"with {source}, which is a gm-mlx model already")
        return Opened(reopen(folder, template=template), source, {"checkpoint": folder}, {"checkpoint": source})
    from gm_mlx.convert.checkpoint import open_checkpoint
    from gm_mlx.convert.towers import missing_tower
    from gm_mlx.convert.translate import translate

    checkpoint = open_checkpoint(folder)
    names = {"checkpoint": source}
    folders = {"checkpoint": folder}
    if base is not None:
        names["base"], folders["base"] = base, find_checkpoint(base)
    if vision is not None:
        names["vision"], folders["vision"] = vision, find_checkpoint(vision)
    elif tower := missing_tower(checkpoint):
        try:
            names["vision"], folders["vision"] = tower, find_checkpoint(tower)
        except UserError as error:
            raise UserError(f"{error}; it is the vision tower of {source}: --vision takes a folder with it") from None
    translation = translate(
        checkpoint,
        vision=folders.get("vision"),
        base=folders.get("base"),
        template=template,
        scale_image_features=scale_image_features,
    )
    return Opened(translation, source, folders, names)


def _change(
    opened: Opened,
    moe: MoEConfig | None,
    split: bool,
    router_rank: int | None,
    recipe: str | None,
    dtype: str | None,
) -> Changed:
    """Does what is asked for with a model, in the order in which one thing needs the other."""
    made = opened.translation
    config, tensors, table = made.config, made.tensors, None
    gm: dict[str, Any] = {**made.provenance, "made_by": f"gm-mlx {__version__}"}
    notes = list(made.notes)
    if config.extra.get("quantization") is not None and (recipe or moe):
        option = "--quantize" if recipe else "--upcycle"
        raise UserError(f"{opened.name}: is quantized, which {option} cannot start from; take what it was made from")
    if moe is not None:
        from gm_mlx.convert.upcycle import upcycle

        config, tensors = upcycle(config, tensors, moe, split=split)
        gm["upcycle"] = {**asdict(moe), "from": "parts of dense FFNs" if split else "copies of dense FFNs"}
    if router_rank is not None:
        from gm_mlx.quant.low_rank import low_rank_routers

        config, tensors, report = low_rank_routers(config, tensors, router_rank)
        gm["routers"] = report.to_dict()
    if recipe is not None:
        from gm_mlx.quant.build import file_dtype
        from gm_mlx.quant.recipes import find_recipe, plan

        chosen = plan(config, recipe)
        table, dtype = chosen.table, dtype or file_dtype(tensors)
        gm["quantization"] = {"recipe": recipe, "summary": find_recipe(recipe).summary}
        notes += [f"{path} {what}" for path, what in chosen.adjusted.items()]
    if dtype is not None:
        gm["dtype"] = str(dtype)
    return Changed(config, tensors, table, dtype, {**gm, "notes": notes}, notes)


def _agreement(
    dense: Translation, split: Changed, calibration: Path | None, samples: int, progress: Progress
) -> Agreement:
    """Measures what splitting costs before any training; one of the two models is in memory at a time."""
    from gm_mlx.quant.build import build_model
    from gm_mlx.quant.calibration import load_samples
    from gm_mlx.quant.evaluate import compare, record

    with TemporaryDirectory(prefix="gm-mlx-") as folder:
        prompts = load_samples(calibration, samples)
        record(build_model(dense.config, dense.tensors), dense.processor, prompts, Path(folder), progress)
        return compare(build_model(split.config, split.tensors), Path(folder), progress)
