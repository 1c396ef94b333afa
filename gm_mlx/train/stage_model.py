"""The model that a stage starts from, and what is written of it when the stage has ended.

A stage starts from a folder and ends in a folder. What did not learn is copied from the one to the other as it is,
tensor by tensor: the weights of a frozen tower come through three stages with all their bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from gm_mlx import __version__, cpu
from gm_mlx.capacity import set_capacity
from gm_mlx.chat_template import PLAIN, TEMPLATES
from gm_mlx.config import ModelConfig, MoEConfig
from gm_mlx.errors import UserError
from gm_mlx.evf import set_allocation
from gm_mlx.folder import STALE, read_model_folder, read_notes
from gm_mlx.model import Model
from gm_mlx.moe import set_gumbel
from gm_mlx.processor import Processor
from gm_mlx.safetensors_writer import MLX_DTYPES
from gm_mlx.tensors import Tensor
from gm_mlx.train.recipes import Stage
from gm_mlx.train.stages import upcycle
from gm_mlx.upcycle import upcycle as upcycle_tensors
from gm_mlx.weights import load_model


@dataclass(frozen=True)
class Start:
    """A stage and the folder that it starts from.

    Attributes:
        folder: the model's.
        stage: the stage.
        own: the model's processor.
        processor: the one that rows are written and images prepared with.
        moe: the experts that are made of a dense model; None for none. A model that has experts keeps them.
        seed: of new routers.
    """

    folder: Path
    stage: Stage
    own: Processor
    processor: Processor
    moe: MoEConfig | None
    seed: int

    @classmethod
    def of(cls, folder: Path, stage: Stage, seed: int = 0) -> Start:
        """Look at a model's folder; nothing is read yet but names and shapes.

        Raises:
            UserError: the folder is no sound model, or none that this stage can start from.
        """
        config, own = ModelConfig.load(folder), Processor.from_folder(folder)
        moe = stage.moe if config.text_config.moe is None else None
        if moe is not None and config.extra.get("quantization") is not None:
            raise UserError(f"--upcycle: {folder} is quantized; take the model that it was made from")
        processor = _with_ways(own, stage)
        if stage.lora is not None and processor.to_dict() != own.to_dict():
            raise UserError(
                f"{folder}: an adapter is used with its model's template and images, {_ways(own)}, and this stage has "
                f"{_ways(processor)}; train the stage before with those"
            )
        return cls(folder, stage, own, processor, moe, seed)

    def model(self) -> Model:
        """The model in memory, with experts, with room at them for so many tokens, and with draws of second ones.

        What learns is still to be chosen; see ``stages.select`` and ``lora.attach.add_lora``.
        """
        model = load_model(self.folder)
        if self.moe is not None:
            model = upcycle(model, self.moe, seed=self.seed)
            cpu.speed_up(model)
        moe, stage = model.config.text_config.moe, self.stage
        drawn = stage.second_expert == "drawn"
        if moe is not None and moe.kind == "evf" and (drawn or stage.capacity is not None):
            key = "second_expert" if drawn else "capacity"
            raise UserError(f"{key}: is of experts, and the model has vision FFNs; they have an allocation")
        set_capacity(model, stage.capacity)
        set_gumbel(model, drawn, in_eval=False)
        if stage.allocation is not None:
            set_allocation(model, stage.allocation)
        return model

    def result(self, model: Model, training: Mapping[str, Any]) -> dict[str, Any]:
        """The model that a stage makes: what learnt from memory, in the files' dtypes, and all else from files.

        Args:
            model: the trained model.
            training: what ``gm.json`` says of the training.

        Returns:
            ``config``, ``tensors``, ``processor`` and ``gm`` for ``write_model_folder``.
        """
        config, tensors = ModelConfig.load(self.folder), read_model_folder(self.folder)
        if self.moe is not None:
            config, tensors = upcycle_tensors(config, tensors, self.moe, seed=self.seed)
        learnt: list[tuple[str, mx.array]] = tree_flatten(model.trainable_parameters())  # type: ignore[assignment]
        for name, array in learnt:
            dtype = tensors[name].dtype
            tensors[name] = Tensor(dtype, array.shape, partial(array.astype, MLX_DTYPES[dtype]))
        # Captions teach the projector and not the decoder, which goes on with the template that it knows.
        processor = self.own if self.stage.template == PLAIN.name else self.processor
        return {"config": config, "tensors": tensors, "processor": processor, "gm": self._notes(processor, training)}

    def _notes(self, processor: Processor, training: Mapping[str, Any]) -> dict[str, Any]:
        """``gm.json``: the old one without what is no longer true, and how the model was trained."""
        notes = {key: value for key, value in read_notes(self.folder).items() if key not in STALE}
        if "training" in notes:
            notes["trained_before"] = [*notes.get("trained_before", []), notes.pop("training")]
        if self.moe is not None:
            notes["upcycle"] = {**dataclasses.asdict(self.moe), "from": "copies of dense FFNs"}
        notes["template"] = processor.template.name
        if processor.image is not None:
            notes["image_mode"] = processor.image.mode
        return {**notes, "training": {"made_by": f"gm-mlx {__version__}", **training}}


def _with_ways(processor: Processor, stage: Stage) -> Processor:
    """A model's processor as a stage writes rows and prepares images."""
    if stage.template is not None:
        if stage.template != processor.template.name:
            processor = processor.with_template(TEMPLATES[stage.template])
    elif processor.template.name == PLAIN.name:
        raise UserError(
            f"the model's chat template is {PLAIN.name!r}, which leaves questions out; name one with --template, such "
            f"as gemma or v1, or {PLAIN.name} for captions"
        )
    if stage.image_mode is not None and processor.image is not None:
        image = dataclasses.replace(processor.image, mode=stage.image_mode)  # type: ignore[arg-type]
        processor = dataclasses.replace(processor, image=image)
    return processor


def _ways(processor: Processor) -> str:
    mode = "no images" if processor.image is None else f"{processor.image.mode!r}"
    return f"{processor.template.name!r} and {mode}"
