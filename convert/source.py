"""Where a model comes from: a checkpoint of PyTorch's, or a model folder of ours that is to be written anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gm_mlx.chat_template import TEMPLATES
from gm_mlx.config import MODEL_TYPE, ModelConfig
from gm_mlx.convert.translate import Translation
from gm_mlx.errors import UserError
from gm_mlx.folder import STALE, read_model_folder
from gm_mlx.processor import Processor
from gm_mlx.weights import weight_files

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # they go wherever the weights go


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is a gm-mlx model, quantized or not."""
    return _json(folder / "config.json").get("model_type") == MODEL_TYPE


def reopen(folder: Path, *, template: str | None = None) -> Translation:
    """A gm-mlx model folder as ``translate`` gives checkpoints; its ``gm.json`` is the provenance.

    What the folder itself was made from moves to the end of the list ``history`` in it.

    Args:
        folder: the folder.
        template: the name of another chat template.

    Raises:
        UserError: the folder is no sound model, or there is no such template.
    """
    config = ModelConfig.load(folder)
    processor = Processor.from_folder(folder)
    provenance = {key: value for key, value in _json(folder / "gm.json").items() if key not in STALE}
    if "sources" in provenance:
        provenance["history"] = [*provenance.get("history", []), provenance.pop("sources")]
    if template is not None:
        if template not in TEMPLATES:
            raise UserError(f"--template {template}: no such template; choose one of {', '.join(TEMPLATES)}")
        provenance["template"] = template
        processor = processor.with_template(TEMPLATES[template])
    return Translation(config, read_model_folder(folder), processor, provenance, weight_files(folder))


def licences(*folders: Path | None) -> dict[str, bytes]:
    """The licence files of all folders that a model is made from; of two with the same name the first."""
    found: dict[str, bytes] = {}
    for folder in filter(None, folders):
        for pattern in LICENCES:
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    found.setdefault(file.name, file.read_bytes())
    return found


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; what is not one is empty, and refused by whoever needs it."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
