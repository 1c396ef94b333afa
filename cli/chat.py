"""``gm-mlx chat``: one question from the command line or a pipe, or a conversation at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gm_mlx.cli import engine_options as shared
from gm_mlx.cli.console import Debug, Progress, checked_text, note, printable, say, stats_line
from gm_mlx.engine import GREEDY, Sampling
from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.engine import Engine, Stats
    from gm_mlx.vlm import VLM

# Sampling options that a temperature of 0 leaves without effect.
CHANCE_OPTIONS = ("top_p", "top_k", "min_p", "seed")


def chat(
    model: shared.Model = None,
    mmproj: shared.MMProj = None,
    gguf_file: shared.GGUFFile = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="FILE", help="An image for the first question; may be repeated."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Ask this, print the answer and leave. Without it, piped input is the question; with it, input is "
            "not read.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="How the model should behave.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the answer, counts and times.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = GREEDY.max_tokens,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; higher is more varied.")
    ] = GREEDY.temperature,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach this probability.")
    ] = GREEDY.top_p,
    top_k: Annotated[int, typer.Option(metavar="N", help="Sample from this many tokens; 0 is all.")] = GREEDY.top_k,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from tokens this likely, relative to the likeliest.")
    ] = GREEDY.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="R", help="Above 1 makes repetition less likely.")
    ] = GREEDY.repetition_penalty,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")] = None,
    kv_bits: shared.CacheBits = None,
    max_kv_size: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the keys and values of so many tokens; older ones are lost.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(metavar="N", help="Read the prompt in pieces of so many tokens. [default: 512]")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", help="Of a GGUF file: room for so many tokens. [default: grows as needed]"
        ),
    ] = None,
    threads: shared.Threads = None,
    n_gpu_layers: shared.GPULayers = None,
    lora: shared.LoRA = None,
    repack: Annotated[
        bool | None,
        typer.Option(
            "--repack/--no-repack", help="Of a GGUF file: rearrange weights for the CPU. [default: what reads faster]"
        ),
    ] = None,
    adapter: shared.Adapter = None,
    no_exif: Annotated[
        bool, typer.Option("--no-exif", help="Do not turn photographs as their EXIF orientation says.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and memory after each answer.")] = False,
    debug: Debug = False,
) -> None:
    """Ask a question about images, or hold a conversation.

    At a terminal without --prompt this is a conversation; /help lists its commands.
    """
    options = shared.engine_options(locals())
    # Everything that can be wrong with the command line is found before the model is loaded, which takes its time.
    interactive = prompt is None and sys.stdin.isatty()
    if interactive and as_json:
        raise UserError("--json answers one question: give it with --prompt or pipe it in")
    if interactive and not sys.stdout.isatty():
        raise UserError("the output is no terminal to hold a conversation at: give the question with --prompt")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if image:
        from gm_mlx.images import load_image

        for path in image:
            load_image(path)
    question = "" if interactive else _question(prompt)
    if temperature == 0:
        for name in CHANCE_OPTIONS:
            if getattr(sampling, name) != getattr(GREEDY, name):
                note(f"--{name.replace('_', '-')} does nothing at --temperature 0")

    progress = Progress()
    began = perf_counter()
    with progress.waiting("load"):
        from gm_mlx.vlm import load

        vlm = load(model, progress=progress, **options)
    load_seconds = perf_counter() - began
    try:
        opened = open_image(vlm.engine, exif=not no_exif)
        if interactive:
            from gm_mlx.cli.repl import Repl

            Repl(vlm, system, sampling, opened, progress, show_stats=stats).run(image or [])
        else:
            answer, counts = _answer(
                vlm, question, [opened(path) for path in image or []], system, sampling, progress, as_json
            )
            if as_json:
                print(json.dumps(_report(vlm.engine, answer, counts, load_seconds)))
            if stats:
                say(stats_line(counts))
    finally:
        vlm.close()


def open_image(engine: Engine, exif: bool) -> Callable[[str], Image]:
    """Returns what opens an image file for an engine.

    The engine knows what its model wants; ``exif`` false says otherwise and takes the pixels as they are stored.
    """
    if exif:
        return engine.open_image

    def as_stored(path: str) -> Image:
        from gm_mlx.images import load_image

        return load_image(path, exif=False)

    return as_stored


def _question(prompt: str | None) -> str:
    """Returns the question of ``--prompt`` or else of stdin."""
    if prompt is not None:
        return checked_text(prompt, "--prompt")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            "the piped input is not UTF-8 text; pipe in a question, and give images with --image"
        ) from error
    return checked_text(text.rstrip("\r\n"), "the piped input")


def _answer(
    vlm: VLM,
    question: str,
    images: Sequence[Image],
    system: str | None,
    sampling: Sampling,
    progress: Progress,
    silent: bool,
) -> tuple[str, Stats]:
    """Asks one question and streams the answer to stdout unless ``silent``; returns it and its counts."""
    for line in vlm.engine.notices(images):
        note(line)
    answer = ""
    try:
        with progress.waiting("encode" if images else "prefill"):
            for piece in vlm.conversation(system).ask(question, images, sampling):
                progress.stop()
                answer += piece.text
                if not silent:
                    print(printable(piece.text) if sys.stdout.isatty() else piece.text, end="", flush=True)
    finally:
        if answer and not silent and not answer.endswith("\n"):
            print()  # also after Ctrl-C, so that the next line is one
    return answer, piece.stats


def _report(engine: Engine, answer: str, stats: Stats, load_seconds: float) -> dict[str, Any]:
    """Returns the object of ``--json``."""
    return {
        "answer": answer,
        "prompt_tokens": stats.prompt_tokens,
        "image_tokens": stats.image_tokens,
        "cached_tokens": stats.cached_tokens,
        "generated_tokens": stats.generated_tokens,
        "seconds": {
            "load": round(load_seconds, 4),
            "encode": round(stats.encode_seconds, 4),
            "prefill": round(stats.prefill_seconds, 4),
            "decode": round(stats.decode_seconds, 4),
        },
        "peak_memory_bytes": stats.peak_memory_bytes,
        "model": engine.model,
        "engine": engine.name,
        "finish_reason": stats.finish_reason,
    }
