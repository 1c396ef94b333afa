"""The two sides of bench_lora.py, each in a process of its own: gm-mlx's trainer and mlx-vlm's.

    python examples/lora_sides.py gm-mlx|mlx-vlm FOLDER

FOLDER has task.json, weights.safetensors and rows.npz. For each line on stdin, the number of steps to do, a line of
JSON is written: the seconds and the loss of each step, and the highest memory so far.

A step is what the trainer itself says it is: the gradient of a batch and the change of the weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Steps = Callable[[int], tuple[list[float], list[float]]]  # number of steps -> seconds and losses

LEARNING_RATE = 1e-4
BITS = {"group_size": 64, "bits": 4}


def main() -> None:
    side, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print to stdout
    load_blas()
    task = json.loads((folder / "task.json").read_text())
    run = SIDES[side](task, folder / "weights.safetensors", dict(np.load(folder / "rows.npz")))

    import mlx.core as mx

    for line in sys.stdin:
        mx.reset_peak_memory()
        seconds, losses = run(int(line))
        counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        result = {"seconds": seconds, "losses": losses, "mlx_bytes": mx.get_peak_memory(), "process_bytes": counted}
        print(json.dumps(result), file=answers, flush=True)


def load_blas() -> None:
    """gm-mlx's BLAS for either side, unless GM_MLX_BLAS says otherwise; mlx-vlm's environment has no gm-mlx."""
    path = Path(__file__).parents[1] / "gm_mlx" / "_blas.py"
    spec = importlib.util.spec_from_file_location("blas", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["blas"] = module
    spec.loader.exec_module(module)
    module.preload()


def gm_mlx_side(task: dict[str, Any], weights: Path, rows: Mapping[str, np.ndarray]) -> Steps:
    import gm_mlx  # noqa: F401  isort: skip  # before mlx
    import mlx.core as mx
    import mlx.nn as nn

    from gm_mlx.config import ModelConfig
    from gm_mlx.cpu import speed_up
    from gm_mlx.lora.attach import add_lora
    from gm_mlx.lora.config import LoRAConfig
    from gm_mlx.mlx_engine import _set_up_backend
    from gm_mlx.model import Model
    from gm_mlx.train.config import TrainConfig
    from gm_mlx.train.data import Batch
    from gm_mlx.train.events import Event
    from gm_mlx.train.loop import train
    from gm_mlx.train.losses import AnswerLoss

    _set_up_backend()
    model = Model(ModelConfig.from_dict(task["config"]))
    model.load_weights(str(weights))
    if task["bits"] == 4:
        nn.quantize(model.language_model, **BITS)
    mx.eval(model.parameters())
    speed_up(model)
    add_lora(model, LoRAConfig(rank=task["rank"], alpha=2.0 * task["rank"], targets=task["targets"]))
    batch = Batch(rows["ids"], rows["learnt"], np.ones_like(rows["learnt"]), mx.array(rows["pixels"]))

    def run(steps: int) -> tuple[list[float], list[float]]:
        done: list[dict[str, Any]] = []

        def watch(event: Event) -> None:
            if event.kind == "step":
                done.append(event.figures)

        config = TrainConfig(steps=steps, learning_rate=LEARNING_RATE, schedule="constant", warmup=0.0)
        with tempfile.TemporaryDirectory() as folder:
            train(model, AnswerLoss(), lambda number, rank, ranks: batch, config, Path(folder), watch=watch)
        return [figures["seconds"] for figures in done], [figures["loss"] for figures in done]

    return run


def mlx_vlm_side(task: dict[str, Any], weights: Path, rows: Mapping[str, np.ndarray]) -> Steps:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_vlm.models import llava
    from mlx_vlm.trainer import VLMTrainingArgs, prepare_model_for_training
    from mlx_vlm.trainer.vlm.sft.runtime import train_vlm

    class Llava(llava.Model):  # type: ignore[misc]
        """mlx-vlm's LLaVA with two corrections, without which it learns something else.

        It takes the padding mask, [B, L], for the mask of attention: with one row no position is masked, so that each
        sees its own answer, and with more rows shapes do not fit. And it puts the images of all rows into each row.
        """

        def __call__(self, input_ids: Any, pixel_values: Any, mask: Any, cache: Any = None, **others: Any) -> Any:
            return super().__call__(input_ids, pixel_values, None, cache, **others)

        def _merge_input_ids_with_image_features(self, features: Any, embeddings: Any, ids: Any) -> Any:
            places = np.nonzero(np.array(ids) == self.config.image_token_index)
            embeddings[tuple(mx.array(axis) for axis in places)] = features.flatten(0, 1)
            return embeddings

    text, vision = task["config"]["text_config"], task["config"]["vision_config"]
    config = llava.ModelConfig(
        text_config=llava.TextConfig(
            model_type="llama",
            **{key: text[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")},
            **{key: text[key] for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")},
        ),
        vision_config=llava.VisionConfig(
            model_type="clip_vision_model",
            **{key: vision[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")},
            **{key: vision[key] for key in ("num_attention_heads", "image_size", "patch_size", "layer_norm_eps")},
        ),
        model_type="llava",
        image_token_index=task["config"]["image_token_index"],
        vocab_size=text["vocab_size"],
    )
    model = Llava(config)
    model.load_weights(str(weights), strict=False)  # it has one layer of the tower more, whose output it does not read
    if task["bits"] == 4:
        nn.quantize(model.language_model, **BITS)
    mx.eval(model.parameters())
    # All linears of the decoder but the head, as by default.
    prepare_model_for_training(model, lora_rank=task["rank"], lora_alpha=2.0 * task["rank"])
    data = [
        {
            "input_ids": mx.array(ids),
            "attention_mask": mx.ones(ids.shape, mx.int32),
            "completion_mask": mx.array(learnt.astype(np.int32)),
            "pixel_values": mx.array(pixels.transpose(2, 0, 1)),
        }
        for ids, learnt, pixels in zip(rows["ids"], rows["learnt"], rows["pixels"], strict=True)
    ]
    optimizer = optim.AdamW(learning_rate=LEARNING_RATE, weight_decay=0.01)

    def run(steps: int) -> tuple[list[float], list[float]]:
        done: list[dict[str, Any]] = []

        class Callback:
            def on_train_loss_report(self, metrics: dict[str, Any]) -> None:
                done.append(metrics)

        with tempfile.TemporaryDirectory() as folder:
            args = VLMTrainingArgs(
                batch_size=len(data),
                iters=steps,
                steps_per_report=1,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
                train_on_completions=True,
            )
            train_vlm(model, optimizer, data, None, args, training_callback=Callback())
        return [metrics["step_time"] for metrics in done], [metrics["train_loss"] for metrics in done]

    return run


SIDES = {"gm-mlx": gm_mlx_side, "mlx-vlm": mlx_vlm_side}

if __name__ == "__main__":
    main()
