"""Speed and memory of LLaVA-GM-2B's decoder in llama.cpp's own benchmark program, with random weights.

    python examples/build_llama_cpp.py --out llama.cpp-bin --target llama-bench
    python examples/bench_gguf.py --llama-bench llama.cpp-bin/llama-bench --folder FILES [--quantize Q4_0 --rounds 5]

Three files of one width are run in turn, round after round, so that a machine that slows down slows all of them:

- a dense Gemma-2B as llama.cpp's native ``gemma``;
- the same weights re-expressed as ``gemma4``: what the re-expression costs;
- LLaVA-GM-2B, with 4 experts of which a token uses 2 in every other layer.

Decoding reads every weight at work once for each token, so the sparse model's speed is predicted from the dense one's:
times the dense file's bytes per token, over the sparse file's. Prefill computes, so it is predicted from the weights at
work. Files are made when FILES lacks them, one by one, and stay there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import gm_mlx  # noqa: F401  (before anything imports mlx)
from gm_mlx.config import ModelConfig
from gm_mlx.convert.random_model import random_model, random_tensors
from gm_mlx.convert.to_gguf.folder import GGUFPair, gguf_pair, plain_target
from gm_mlx.convert.to_gguf.quantize import quantize_gguf
from gm_mlx.convert.to_gguf.text import text_model
from gm_mlx.convert.to_gguf.types import Target, find_target
from gm_mlx.convert.to_gguf.write import write_gguf
from gm_mlx.gguf_file import GGUFHeader, read_header
from gm_mlx.presets import PRESETS
from gm_mlx.processor import Processor
from gm_mlx.tensors import Tensor

SPARSE = "LLaVA-GM-2B"
DENSE, REEXPRESSED = "dense, gemma", "dense, gemma4"


@dataclass
class Run:
    """One start of the benchmark program."""

    prefill: float  # tokens/s
    decode: float  # tokens/s
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are, or are made")
    parser.add_argument("--quantize", default="Q4_0", help="a type of llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of prefill")
    parser.add_argument("--generate", type=int, default=24, help="tokens of decoding")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--option", action="append", default=[], help="one more word for llama-bench, such as -ub=256")
    parser.add_argument("--only", action="append", help="of the three files, those whose name holds this")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: make(name, arguments.folder, arguments.quantize)
        for name in (DENSE, REEXPRESSED, SPARSE)
        if not arguments.only or any(part in name for part in arguments.only)
    }
    words = ["-p", arguments.prompt, "-n", arguments.generate, "-t", arguments.threads, "-r", 1]
    options = [*words, *(word for option in arguments.option for word in option.split("=", 1))]
    runs: dict[str, list[Run]] = {name: [] for name in files}
    for _ in range(arguments.rounds):
        for name, path in files.items():
            runs[name].append(bench(arguments.llama_bench, path, options))
            print(f"  {name}: {runs[name][-1]}", flush=True)
    show(files, runs)


def make(name: str, folder: Path, kind: str) -> Path:
    """The file of a model, made if it is not there."""
    path = folder / f"{name.replace(', ', '-')}-{kind}.gguf"
    if path.is_file():
        return path
    config = PRESETS["llava-gm-2b"]
    if name != SPARSE:
        config = replace(config, text_config=replace(config.text_config, moe=None))
    made = random_model("llava-gm-2b")
    tensors = made.tensors if name == SPARSE else random_tensors(config)
    pair = pair_of(config, tensors, made.processor, native=name == DENSE)
    target = find_target(kind, {})
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    write(pair, target, partial, folder)
    partial.replace(path)
    return path


def pair_of(config: ModelConfig, tensors: dict[str, Tensor], processor: Processor, native: bool) -> GGUFPair:
    """The files of a model; ``native`` false re-expresses a dense one, too."""
    pair = gguf_pair(config, tensors, processor, name="random")
    if not native and pair.text.arch == "gemma":
        other = text_model(config, tensors, arch="gemma4")
        pair.text.arch, pair.text.pieces = other.arch, other.pieces
        pair.text.metadata |= other.metadata
    return pair


def write(pair: GGUFPair, target: Target, path: Path, folder: Path) -> None:
    if not target.needs_llama_cpp:
        write_gguf(path, pair.text, target)
        return
    with tempfile.TemporaryDirectory(dir=folder) as work:
        plain = Path(work) / "plain.gguf"
        write_gguf(plain, pair.text, plain_target(pair.text))
        quantize_gguf(plain, path, target)


def bench(program: Path, path: Path, options: Sequence[object]) -> Run:
    """Run the program once; its memory is read while it runs, the mapped file among it."""
    command = [str(word) for word in [program, "-m", path, *options, "-o", "json"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        peak = 0
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            peak = max(peak, int(lines.get("VmHWM", "0 kB").split()[0]) * 1024)
            time.sleep(0.05)
        assert process.stdout is not None
        results = json.loads(process.stdout.read())
    speeds = {bool(result["n_gen"]): result["avg_ts"] for result in results}
    return Run(speeds[False], speeds.get(True, math.nan), peak)  # with --generate 0 nothing is decoded


def active(header: GGUFHeader) -> tuple[int, int]:
    """Bytes that decoding one token reads, and weights that prefill multiplies a token with."""
    keys, arch = header.metadata, header.metadata["general.architecture"]
    used, experts = keys.get(f"{arch}.expert_used_count", 1), keys.get(f"{arch}.expert_count", 1)
    num_bytes = num_weights = 0
    for name, tensor in header.tensors.items():
        share = used / experts if "_exps" in name else 1
        num_bytes += int(tensor.nbytes * share)  # the embedding is the head: read whole, once
        num_weights += (
            0 if "token_embd" in name else int(math.prod(tensor.shape) * share)
        )  # of a prompt only the last row has logits
    return num_bytes, num_weights


def show(files: dict[str, Path], runs: dict[str, list[Run]]) -> None:
    print("\n| file | size | bytes per token | prefill tok/s | decode tok/s | peak memory |\n|---|---|---|---|---|---|")
    for name, path in files.items():
        each = runs[name]
        cells = [f"{path.stat().st_size / 1e9:.3f} GB", f"{active(read_header(path))[0] / 1e9:.3f} GB"]
        cells += [spread([run.prefill for run in each]), spread([run.decode for run in each])]
        print(f"| {name} | {' | '.join(cells)} | {median(run.peak_bytes for run in each) / 1e9:.2f} GB |")
    first = next(iter(files))
    print()
    for name in list(files)[1:]:
        pairs = list(zip(runs[first], runs[name], strict=True))
        prefill = median(b.prefill / a.prefill for a, b in pairs)
        decode = median(b.decode / a.decode for a, b in pairs)
        memory = median(b.peak_bytes / a.peak_bytes for a, b in pairs)
        size = files[name].stat().st_size / files[first].stat().st_size
        (bytes_a, weights_a), (bytes_b, weights_b) = (active(read_header(files[each])) for each in (first, name))
        print(f"{name} against {first}: size {size:.4f}, memory {memory:.4f}")
        print(f"  times as fast: prefill {prefill:.3f}, decode {decode:.3f}")
        print(f"  predicted: prefill {weights_a / weights_b:.3f}, decode {bytes_a / bytes_b:.3f}")
        print(
            f"  reached of that: prefill {prefill * weights_b / weights_a:.1%}, decode {decode * bytes_b / bytes_a:.1%}"
        )


def spread(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    main()
