"""Peak memory of a LoRA step at the presets' widths, measured with few layers and extrapolated to all of them.

    python examples/bench_lora_memory.py [--preset llava-gm-2b] [--rows 1 2 4] [--rank 8 64] [--json FILE]
    python examples/bench_lora_memory.py --estimate cpu|gpu --preset llava-1.5-7b moe-llava-phi2-2.7b

Models are quantized as ``gm-mlx quantize`` does it unless told otherwise (recipe q4), with random codes. LoRA is on
attention, networks, experts and the projector. A row is an image and 64 tokens more, of which 16 are learnt. Every
number is that of a process of its own, in which a step is done with 2 and with 4 decoder layers: what two more
add is added as often as the preset has more of them. The tower has two layers in place of all, since nothing of it is
kept: its other layers count with their weights.

Beside it stands what ``gm_mlx.train.memory`` estimates, which is all that ``--estimate`` prints: for the layers of
gm_mlx.cpu, which compute in float32, or for MLX's own in half precision, as on a GPU. 1 GB is 2**30 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import gm_mlx  # noqa: F401  (before anything imports mlx)
from gm_mlx.config import ModelConfig
from gm_mlx.footprint import HALF, planned_bytes
from gm_mlx.inventory import model_layers
from gm_mlx.lora.config import LoRAConfig, choose_targets
from gm_mlx.presets import PRESETS
from gm_mlx.quant.recipes import recipe_table
from gm_mlx.train.memory import STOCK, training_bytes

FEW, MORE = 2, 4  # layers: a sparse and a dense one, and once more
TOWER_LAYERS = 3  # of which two run in CLIP's
TEXT, LEARNT = 64, 16
GB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=["llava-gm-2b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--estimate", choices=("cpu", "gpu"), help="measure nothing")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for preset in arguments.preset:
        if PRESETS[preset].text_config.series_layers and not arguments.estimate:
            parser.error(f"{preset}: its first layers are no others; there is but an --estimate")
    if arguments.child:
        print(json.dumps(measure(**arguments.child)))
        return
    measured = (
        [] if arguments.estimate else [*(f"{n} layers" for n in (FEW, MORE)), f"{MORE}, estimated", "all, extrapolated"]
    )
    titles = ["model", "rows", "rank", "checkpointing", *measured, "all, estimated"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    found = []
    for preset in arguments.preset:
        for rows in arguments.rows:
            for rank in arguments.rank:
                for checkpoint in (False, True):
                    case = {"preset": preset, "rows": rows, "rank": rank, "checkpoint": checkpoint}
                    found.append(case | ({} if arguments.estimate else measured_at(**case)))
                    gpu = arguments.estimate == "gpu"
                    found[-1]["estimate"] = estimated(PRESETS[preset], rows, rank, checkpoint, gpu)
                    show(found[-1])
                    if arguments.json:
                        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def show(case: dict[str, Any]) -> None:
    """Print a line of the table."""
    places = [("few", "peak"), ("more", "peak"), ("more", "estimate"), ("all", "peak")]
    measured = [case[layers][what] for layers, what in places if layers in case]
    cells = [case["preset"], case["rows"], case["rank"], "on" if case["checkpoint"] else "off"]
    cells += [f"{size / GB:.1f} GB" for size in (*measured, case["estimate"])]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def measured_at(preset: str, rows: int, rank: int, checkpoint: bool) -> dict[str, Any]:
    """Peaks with few layers and with more, and what follows from them for all."""
    few, more = (
        run_child(preset=preset, layers=layers, rows=rows, rank=rank, checkpoint=checkpoint) for layers in (FEW, MORE)
    )
    full = PRESETS[preset]
    pairs = (full.text_config.num_hidden_layers - MORE) / (MORE - FEW)
    tower = tower_bytes(full) - tower_bytes(cut(full, MORE))
    return {"few": few, "more": more, "all": {"peak": int(more["peak"] + pairs * (more["peak"] - few["peak"]) + tower)}}


def run_child(**what: Any) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(what)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(preset: str, layers: int, rows: int, rank: int, checkpoint: bool) -> dict[str, Any]:
    """Do a step; returns the peak of the process, that of MLX's own arrays, and the estimate."""
    import tempfile

    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten, tree_unflatten

    from gm_mlx.bench.child import peak_memory
    from gm_mlx.cpu import speed_up
    from gm_mlx.lora.attach import add_lora
    from gm_mlx.model import Model
    from gm_mlx.train.config import TrainConfig
    from gm_mlx.train.data import Batch
    from gm_mlx.train.loop import train
    from gm_mlx.train.losses import AnswerLoss
    from gm_mlx.weights import PACKED, apply_quantization, quantized_layers

    config = cut(PRESETS[preset], layers)
    model = Model(config)
    apply_quantization(model, recipe_table(config, "q4"))
    packed = {f"{path}.{name}" for path in quantized_layers(model) for name in PACKED}

    def random(name: str, array: mx.array) -> mx.array:
        """As a model on a CPU has it: scales in the file's half precision, what is not packed in float32."""
        if array.dtype == mx.uint32:
            return mx.random.randint(-(2**31), 2**31 - 1, array.shape).view(mx.uint32)
        return mx.random.uniform(-0.01, 0.01, array.shape, mx.bfloat16 if name in packed else mx.float32)

    # In place of numbers that were never computed.
    model.update(tree_unflatten([(name, random(name, array)) for name, array in tree_flatten(model.parameters())]))
    mx.eval(model.parameters())
    forget_peak()
    speed_up(model)
    add_lora(model, lora_of(rank))

    length, size = length_of(config), config.vision_config.image_size
    ids = np.random.default_rng(0).integers(10, 700, (rows, length), dtype=np.int32)
    ids[:, 4 : 4 + config.num_image_tokens] = config.image_token_index
    learnt = np.zeros(ids.shape, bool)
    learnt[:, -LEARNT:] = True
    batch = Batch(ids, learnt, np.ones_like(learnt), mx.random.normal((rows, size, size, 3)))
    plan = TrainConfig(steps=1, learning_rate=1e-4, checkpoint=checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        train(model, AnswerLoss(), lambda number, rank, ranks: batch, plan, Path(folder))
    return {
        "peak": peak_memory(),
        "mlx_peak": mx.get_peak_memory(),
        "estimate": estimated(config, rows, rank, checkpoint),
    }


def forget_peak() -> None:
    """What making the model took is not what training takes."""
    import mlx.core as mx

    mx.clear_cache()
    mx.reset_peak_memory()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now


def estimated(config: ModelConfig, rows: int, rank: int, checkpoint: bool, gpu: bool = False) -> int:
    """What ``gm_mlx.train.memory`` says of such a model and step."""
    weights = sum(planned_bytes(model_layers(config), recipe_table(config, "q4")).values())
    # Of each matrix [out, in], or expert, A [rank, in] and B [out, rank].
    shapes = [target.shape for target in choose_targets(config, lora_of(rank))]
    trained = sum(prod(shape[:-2]) * rank * sum(shape[-2:]) for shape in shapes)
    step: dict[str, Any] = {
        "rows": rows,
        "length": length_of(config),
        "checkpoint": checkpoint,
        "learnt": rows * LEARNT,
    }
    if gpu:
        step |= {"kept": STOCK, "number": HALF}
    return training_bytes(config, weights, trained, **step)


def lora_of(rank: int) -> LoRAConfig:
    return LoRAConfig(rank=rank, alpha=2.0 * rank)


def length_of(config: ModelConfig) -> int:
    """Positions of a row."""
    return config.num_image_tokens + TEXT


def tower_bytes(config: ModelConfig) -> int:
    """Weights of a model's tower."""
    layers = [layer for layer in model_layers(config) if layer.component == "tower"]
    return sum(planned_bytes(layers, recipe_table(config, "q4")).values())


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The config with so many decoder layers, and a tower of few."""
    vision = replace(config.vision_config, num_hidden_layers=TOWER_LAYERS)
    return replace(config, text_config=replace(config.text_config, num_hidden_layers=layers), vision_config=vision)


if __name__ == "__main__":
    main()
