"""A PyTorch LLaVA as one side of a comparison: Hugging Face's own code on Hugging Face's own files, in float32.

torch and transformers are no dependencies of gm-mlx; they are imported here and only when such a model is compared.
What every stage makes of a prompt is taken by hooks, by the names that the modules have had in all versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from gm_mlx.config import MODEL_TYPE
from gm_mlx.errors import UserError
from gm_mlx.stages import NO_TOKEN, FolderSide, Inputs, Limits, Precision, Side, Trace

PROJECTOR = re.compile(r"(?:.*\.)?multi_modal_projector")
LAYER = re.compile(r"(?:.*\.)?language_model\.(?:model\.)?layers\.(\d+)")
NORM = re.compile(r"(?:.*\.)?language_model\.(?:model\.)?(?:final_layer)?norm")
HEAD = re.compile(r"(?:.*\.)?lm_head")


def open_side(name: str, folder: Path) -> Side:
    """The side that a folder is: ours, or a Hugging Face LLaVA.

    Raises:
        UserError: it is another kind of checkpoint, or torch or transformers is missing.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        model_type = config.get("model_type", MODEL_TYPE)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; a model folder has a config.json") from None
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path}: not a JSON object; fetch or convert the model again") from None
    if model_type == MODEL_TYPE:
        return FolderSide(name, folder)
    if model_type != "llava" or "text_config" not in config:
        raise UserError(
            f"{folder}: transformers has no code for model_type {model_type!r}; convert it with `gm-mlx convert` and "
            "compare what that wrote"
        )
    return TorchSide(name, folder)


class TorchSide:
    """A folder that ``LlavaForConditionalGeneration`` loads."""

    config = None
    processor = None
    caveats: Mapping[str, str] = {}

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{folder}: a PyTorch model, and {error.name} is not installed; run `pip install torch transformers`, "
                "or compare model folders"
            ) from None

    def run(self, inputs: Sequence[Inputs], limits: Limits) -> tuple[Precision, list[Trace]]:
        """Loads the model and lets it read everything.

        Raises:
            UserError: transformers cannot load it.
        """
        import torch
        from transformers import LlavaForConditionalGeneration
        from transformers.utils import logging

        # Its remarks are for those who write code with it; what matters of them is checked below.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                self.folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # those of several libraries come through
            reason = str(error).split("\n")[0] or type(error).__name__
            raise UserError(f"{self.folder}: transformers cannot load it ({reason}); fetch it again") from None
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            # transformers would go on with random numbers.
            raise UserError(f"{self.folder}: tensor {missing[0]!r} is missing from its files; fetch it again")
        stored = str(model.dtype).removeprefix("torch.")
        model = model.float().eval()
        with torch.no_grad():
            return Precision(stored, "float32"), [_trace(model, each, limits) for each in inputs]


def _trace(model: Any, inputs: Inputs, limits: Limits) -> Trace:
    """One question through the model: the first pass of its generation gives the stages."""
    import torch

    image_token = model.config.image_token_index if hasattr(model.config, "image_token_index") else None
    image_token = model.config.image_token_id if image_token is None else image_token
    ids = torch.from_numpy(np.where(inputs.ids == NO_TOKEN, image_token, inputs.ids))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if inputs.pixels is not None:
        arguments["pixel_values"] = torch.from_numpy(inputs.pixels.transpose(0, 3, 1, 2).copy())  # [N, 3, H, W]
    stages: dict[str, np.ndarray] = {}
    hooks = _hooks(model, stages, int((inputs.ids == NO_TOKEN).sum()))
    rows = model.get_output_embeddings().weight.shape[0]
    banned = sorted({*range(limits.vocab_size, rows), image_token} & set(range(rows)))
    try:
        out = model.generate(
            **arguments,
            max_new_tokens=limits.max_tokens,
            do_sample=False,
            num_beams=1,
            suppress_tokens=banned or None,
            eos_token_id=sorted(limits.stop_ids),
            pad_token_id=min(limits.stop_ids),
        )
    finally:
        for hook in hooks:
            hook.remove()
    answer = []
    for token in out[0, ids.shape[1] :].tolist():
        if token in limits.stop_ids:
            break
        answer.append(token)
    stages["logits"] = stages["logits"][:, -1, : limits.vocab_size]
    return Trace({stage: stages[stage] for stage in _in_order(stages)}, {}, answer)


def _hooks(model: Any, stages: dict[str, np.ndarray], slots: int) -> list[Any]:
    """Notes what each stage makes of the first pass, which is the prompt; later passes are single tokens.

    Hugging Face's LLaVA has no pooling. Where the other model has (``spatial_pool_stride``), its prompt has fewer
    ``slots`` for images, and the projector's output is pooled here as much.
    """

    def keep(stage: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if stage not in stages:
            stages[stage] = value.detach().float().numpy().copy()

    def projector(module: Any, inputs: Any, output: Any) -> Any:
        pooled = _pool(output, slots)
        keep("tower", inputs[0])
        keep("projector", pooled)
        return pooled

    def first_layer(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        keep("embeddings", inputs[0] if inputs else named["hidden_states"])

    def after(stage: str) -> Any:
        return lambda module, inputs, output: keep(stage, output)

    hooks = []
    for name, module in model.named_modules():
        if PROJECTOR.fullmatch(name):
            hooks.append(module.register_forward_hook(projector))
        elif match := LAYER.fullmatch(name):
            hooks.append(module.register_forward_hook(after(f"layer {match[1]}")))
            if match[1] == "0":
                hooks.append(module.register_forward_pre_hook(first_layer, with_kwargs=True))
        elif NORM.fullmatch(name):
            hooks.append(module.register_forward_hook(after("norm")))
        elif HEAD.fullmatch(name):
            hooks.append(module.register_forward_hook(after("logits")))
    return hooks


def _pool(features: Any, slots: int) -> Any:
    """Features [N, P, D] averaged over squares of patches, so that all images together fill the slots: [N, T, D]."""
    from torch.nn.functional import avg_pool2d

    images, positions, size = features.shape
    grid, side = isqrt(positions), isqrt(slots // images)
    if images * positions == slots:
        return features
    if grid**2 != positions or images * side**2 != slots or not side or grid % side:
        raise UserError(
            f"tokens per image: PyTorch's model has {positions} where the other has {slots / images:g}; they are not "
            "forms of one model"
        )
    maps = features.transpose(1, 2).reshape(images, size, grid, grid)
    return avg_pool2d(maps, grid // side).flatten(2).transpose(1, 2)


def _in_order(stages: dict[str, np.ndarray]) -> list[str]:
    layers = sorted((stage for stage in stages if stage.startswith("layer ")), key=lambda stage: int(stage[6:]))
    order = ["tower", "projector", "embeddings", *layers, "norm", "logits"]
    return [stage for stage in order if stage in stages]
