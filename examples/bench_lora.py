"""Speed of a LoRA step: gm-mlx's trainer against mlx-vlm's, on the same weights, rows and targets.

    python examples/bench_lora.py [--json FILE]          # 4 bits and float32, 1 and 4 rows
    python examples/bench_lora.py --as-shipped           # mlx-vlm without the BLAS that gm-mlx looks for, too

The model is a LLaVA with a CLIP tower and a dense Llama as its decoder, which both can train, with random weights. LoRA
is on all linears of the decoder but the head, which is mlx-vlm's default. A row is an image, a question and an answer;
loss is on the answer. Each side is a process of its own, and they take turns, so that a machine that slows down slows
both. Before anything counts, the first losses have to agree: else the two would not do the same work.

Where MLX computes on a CPU, mlx-vlm gets the BLAS that gm-mlx loads for itself: without it, float32 products are 30
times slower. For the record gm-mlx trains a sparse Gemma of the same width as well, LoRA on its experts included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import gm_mlx  # noqa: F401  (before anything imports mlx)
from gm_mlx._blas import status
from gm_mlx.bench.machine import cpu_name
from gm_mlx.config import ModelConfig, MoEConfig, TextConfig, VisionConfig

OURS, THEIRS, SHIPPED, SPARSE = "gm-mlx", "mlx-vlm", "mlx-vlm, as shipped", "gm-mlx, sparse"
# Losses of a first step: both sides sum the same numbers in other orders.
AGREE = 1e-3


@dataclass(frozen=True)
class Shape:
    """The model and its rows; the defaults are what the benchmark measures."""

    hidden: int = 1024
    ffn: int = 2816
    heads: int = 16
    layers: int = 4
    vocab: int = 32000
    tower: int = 1024
    tower_layers: int = 5
    image: int = 224
    text: int = 64
    answer: int = 16


@dataclass
class Side:
    """A trainer, and what it said in each round."""

    name: str
    process: subprocess.Popen[str]
    rounds: list[dict[str, Any]]

    def run(self, steps: int) -> dict[str, Any]:
        """Let it do some steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; --verbose shows what it said")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 32), default=[4, 32])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="of a batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of a side in a round")
    parser.add_argument("--as-shipped", action="store_true", help="mlx-vlm without a BLAS too: minutes in float32")
    parser.add_argument("--no-sparse", action="store_true", help="leave the sparse model out")
    parser.add_argument("--mlx-vlm-python", default=sys.executable, help="of an environment with mlx-vlm")
    parser.add_argument("--json", type=Path, help="also write all times and losses to this file")
    parser.add_argument("--verbose", action="store_true", help="show what the trainers say")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(Shape())})

    import mlx.core as mx

    print(f"{cpu_name()}, {os.cpu_count()} cores; mlx {mx.__version__}; BLAS: {status()}")
    print(f"{shape}; LoRA of rank {arguments.rank}; {arguments.rounds} rounds of {arguments.steps} steps\n")
    print("| weights | rows × length | trainer | tokens/s | step | gm-mlx is faster by | peak memory | first loss |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for bits in arguments.bits:
        for rows in arguments.rows:
            results.append(case(shape, bits, rows, arguments))
            if arguments.json:
                arguments.json.write_text(json.dumps({"shape": asdict(shape), "cases": results}, indent=1) + "\n")


def case(shape: Shape, bits: int, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all sides with one batch, and print their lines of the table."""
    wanted = [OURS, THEIRS] + [SHIPPED] * arguments.as_shipped + [SPARSE] * (not arguments.no_sparse)
    with tempfile.TemporaryDirectory() as work:
        sides = [start(name, shape, bits, rows, arguments, Path(work) / name) for name in wanted]
        try:
            first = {side.name: side.run(1)["losses"][0] for side in sides}  # also warms up
            for name in {THEIRS, SHIPPED} & first.keys():
                if abs(first[name] - first[OURS]) > AGREE * first[OURS]:
                    raise SystemExit(f"the first losses differ, so the work does: {first}")
            for _ in range(arguments.rounds):
                for side in sides:
                    side.rounds.append(side.run(arguments.steps))
        finally:
            for side in sides:
                side.process.kill()
                side.process.wait()
    length = tokens_of(config_of(shape), shape)
    return show(sides, first, f"{'float32' if bits == 32 else '4 bits'} | {rows} × {length}", rows * length)


def start(name: str, shape: Shape, bits: int, rows: int, arguments: argparse.Namespace, folder: Path) -> Side:
    """Write a side's files, and start it."""
    config = config_of(shape, sparse=name == SPARSE)
    folder.mkdir()
    targets = ["attention", "dense_ffn", *(["experts"] if name == SPARSE else [])]
    task = {"config": config.to_dict(), "bits": bits, "rank": arguments.rank, "targets": targets}
    (folder / "task.json").write_text(json.dumps(task))
    write_weights(config, folder / "weights.safetensors")
    np.savez(folder / "rows.npz", **make_rows(config, shape, rows))  # type: ignore[arg-type]
    theirs = name in (THEIRS, SHIPPED)
    python = arguments.mlx_vlm_python if theirs else sys.executable
    command = [python, str(Path(__file__).with_name("lora_sides.py")), THEIRS if theirs else OURS, str(folder)]
    environment = os.environ | ({"GM_MLX_BLAS": "off"} if name == SHIPPED else {})
    said = None if arguments.verbose else subprocess.DEVNULL
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=environment)
    return Side(name, process, [])


def config_of(shape: Shape, sparse: bool = False) -> ModelConfig:
    """LLaVA with a dense Llama, or with a sparse Gemma."""
    text = TextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocab,
    )
    if sparse:
        text = replace(text, moe=MoEConfig(num_experts=4, top_k=2))
    else:
        text = replace(text, hidden_act="silu", norm_plus_one=False, scale_embeddings=False, tie_word_embeddings=False)
    tower = VisionConfig(
        "clip_vision_model", shape.tower, 4 * shape.tower, shape.tower_layers, shape.heads, shape.image, patch_size=14
    )
    return ModelConfig(text, tower, image_token_index=shape.vocab - 1)


def write_weights(config: ModelConfig, path: Path) -> None:
    import mlx.core as mx

    from gm_mlx.convert.random_model import random_tensors

    tensors = random_tensors(config, dtype="float32")
    mx.save_safetensors(str(path), {name: tensor.read() for name, tensor in tensors.items()})


def tokens_of(config: ModelConfig, shape: Shape) -> int:
    """Positions of a row. mlx-vlm cuts the last one off, since nothing follows it."""
    return config.num_image_tokens + shape.text


def make_rows(config: ModelConfig, shape: Shape, rows: int) -> dict[str, np.ndarray]:
    """A batch: four tokens, an image, a question and an answer."""
    random, length = np.random.default_rng(0), tokens_of(config, shape)
    ids = random.integers(10, shape.vocab - 10, (rows, length), dtype=np.int32)
    ids[:, 4 : 4 + config.num_image_tokens] = config.image_token_index
    learnt = np.zeros(ids.shape, bool)
    learnt[:, -shape.answer :] = True
    return {
        "ids": ids,
        "learnt": learnt,
        "pixels": random.normal(size=(rows, shape.image, shape.image, 3)).astype("f4"),
    }


def show(sides: list[Side], first: dict[str, float], what: str, tokens: int) -> dict[str, Any]:
    """Print the lines of a case; returns all that was measured."""
    seconds = {side.name: [median(turn["seconds"]) for turn in side.rounds] for side in sides}
    speed_up = {
        name: median(other / ours for ours, other in zip(seconds[OURS], own, strict=True))
        for name, own in seconds.items()
        if name != OURS
    }
    for side in sides:
        own = seconds[side.name]
        cells = [
            f"{tokens / median(own):,.0f}",
            f"{median(own):.2f} s ({min(own):.2f}–{max(own):.2f})",
            "–" if side.name in (OURS, SPARSE) else f"{speed_up[side.name]:.2f} ×",
            f"{max(turn['process_bytes'] for turn in side.rounds) / 1e9:.2f} GB",
            f"{first[side.name]:.4f}",
        ]
        print(f"| {what} | {side.name} | {' | '.join(cells)} |", flush=True)
    return {
        "what": what,
        "tokens": tokens,
        "first_losses": first,
        "sides": {side.name: side.rounds for side in sides},
        "speed_up": speed_up,
    }


if __name__ == "__main__":
    main()
