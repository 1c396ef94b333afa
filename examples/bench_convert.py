"""How much memory and time does converting take? Measures `gm-mlx convert` on checkpoints made for the purpose.

    python examples/bench_convert.py                       # a 4 GB checkpoint, plain and with --quantize q4
    python examples/bench_convert.py --full-size           # llava-gm-2b in full size, random, with --quantize q4
    python examples/bench_convert.py --size-gb 0.02        # a quick look

The checkpoint is in Hugging Face's LLaVA layout with a Gemma decoder, in bfloat16 and in shards. Each conversion runs
in a process of its own, so that the peak memory is that of the conversion and of nothing else. "above" is
the peak minus what the same program needs to convert next to nothing; it is to be compared with the largest tensor.
"""

from __future__ import annotations

import gm_mlx  # isort: skip  # loads BLAS, which must happen before anything imports mlx

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from gm_mlx.config import ModelConfig, TextConfig, VisionConfig
from gm_mlx.convert.random_model import random_tensors
from gm_mlx.hub import find_model
from gm_mlx.safetensors_header import Entry
from gm_mlx.safetensors_writer import bytes_of, num_bytes, write_safetensors
from gm_mlx.tensors import Tensor
from gm_mlx.tokenizer import load_tokenizer

SHARD_BYTES = 1 << 30
SMALL_GB = 0.005  # of a checkpoint that takes next to no memory
OPTIONS: tuple[list[str], ...] = (
    [],
    ["--quantize", "q4"],
    ["--upcycle", "4x2", "--quantize", "q4"],
    ["--to", "gguf", "--quantize", "Q4_0"],
    ["--to", "gguf", "--quantize", "Q4_K_M"],
)
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
# What runs in the child: the command, and then its own peak on the last line. On Linux ru_maxrss would not do: a child
# begins with the peak of the process that started it.
CHILD = """
import re, resource, sys
from gm_mlx.cli.main import main
code = main(sys.argv[1:])
if sys.platform == "linux":
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@dataclass(frozen=True)
class Run:
    """One conversion: its peak memory, the time that it says it took, and the bytes that it wrote."""

    peak: int
    seconds: float
    written: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--full-size", action="store_true", help="a random model in the shape of --preset instead")
    parser.add_argument("--preset", default="llava-gm-2b", help="for --full-size")
    parser.add_argument("--folder", type=Path, help="where files go for the time; twice the size is needed")
    arguments = parser.parse_args()

    print(f"{platform.machine()}, {os.cpu_count()} cores; mlx {mx.__version__}; gm-mlx {gm_mlx.__version__}\n")
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=arguments.folder) as name:
        folder = Path(name)
        write_checkpoint(folder / "small", SMALL_GB)
        floor = convert([str(folder / "small")], folder / "out").peak
        print(f"{'convert':<38} {'read':>9} {'written':>9} {'seconds':>8} {'peak':>9} {'above':>9} {'largest':>9}")
        read = largest = 0
        source = ["--preset", arguments.preset, "--random"]
        if not arguments.full_size:
            read, largest = write_checkpoint(folder / "checkpoint", arguments.size_gb)
            source = [str(folder / "checkpoint")]
        for options in OPTIONS:
            if arguments.full_size and "--upcycle" in options:
                continue  # the presets have experts
            run = convert([*source, *options], folder / "out")
            what = " ".join([*(source if arguments.full_size else ["CHECKPOINT"]), *options])
            print(
                f"{what:<38} {mb(read):>9} {mb(run.written):>9} {run.seconds:>8.1f} {mb(run.peak):>9} "
                f"{mb(run.peak - floor):>9} {mb(largest):>9}",
                flush=True,
            )


def convert(arguments: list[str], out: Path) -> Run:
    """Run the command in a process of its own; what it wrote is removed."""
    command = [sys.executable, "-c", CHILD, "convert", *arguments, "-o", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    said, peak = done.stdout.strip().splitlines()
    written = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    return Run(int(peak), json.loads(said)["seconds"], written)


def mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes else "-"


def write_checkpoint(folder: Path, size_gb: float) -> tuple[int, int]:
    """Write a dense checkpoint of about that size; returns its bytes, and those of its largest tensor."""
    folder.mkdir()
    config = sized_config(size_gb)
    # Hugging Face's names are gm-mlx's; of the shapes only the patch embedding's differs.
    tensors = random_tensors(config)
    out, height, width, channels = tensors[PATCHES].shape
    shape = (out, channels, height, width)
    tensors[PATCHES] = Tensor("BF16", shape, lambda: mx.zeros(shape, mx.bfloat16))
    sizes = {name: num_bytes(Entry(tensor.dtype, tensor.shape)) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        entries = {name: Entry(tensors[name].dtype, tensors[name].shape) for name in names}
        write_safetensors(folder / file, entries, (bytes_of(tensors[name].read()) for name in names))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    load_tokenizer(find_model()).save(folder)
    return sum(sizes.values()), max(sizes.values())


def sized_config(size_gb: float) -> ModelConfig:
    """Gemma-2B's widths, or narrower ones below 4 GB, and as many layers as the size takes."""
    scale = min(1.0, (size_gb / 4) ** 0.5)
    hidden = max(128, round(2048 * scale / 128) * 128)
    vocab = max(1024, round(256_000 * scale / 64) * 64)
    text = TextConfig(hidden, 8 * hidden, 1, 8, 1, hidden // 8, vocab_size=vocab)
    layer = 2 * (3 * 8 + 2 + 2 / 8) * hidden**2  # bytes: FFN, queries and outputs, keys and values
    layers = max(1, round((size_gb * 1e9 - 2 * vocab * hidden) / layer))
    wide = scale == 1
    return ModelConfig(
        TextConfig(**{**vars(text), "num_hidden_layers": layers}),
        VisionConfig(
            model_type="clip_vision_model",
            hidden_size=1024 if wide else 64,
            intermediate_size=4096 if wide else 256,
            num_hidden_layers=24 if wide else 2,
            num_attention_heads=16 if wide else 1,
            image_size=336 if wide else 28,
            patch_size=14,
        ),
        image_token_index=vocab - 1,
    )


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers 4 writes for such a model."""
    text = config.text_config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    return {
        "model_type": "llava",
        "transformers_version": "4.40.0",
        "image_token_index": config.image_token_index,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "projector_hidden_act": config.projector_hidden_act,
        "text_config": {"model_type": "gemma", **{key: getattr(text, key) for key in keys}},
        "vision_config": {**vars(config.vision_config)},
    }


if __name__ == "__main__":
    main()
