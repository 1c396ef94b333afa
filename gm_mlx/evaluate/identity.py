"""What makes two runs of a benchmark the same: the weights, how the model is run, and what it is asked.

Answers of one model must not go on with those of another one of the same name. A name is not enough, and files that
were copied elsewhere are still the same, so it is the content that counts.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.evaluate.question import Question
from gm_mlx.gguf_file import read_header
from gm_mlx.gguf_files import find_gguf
from gm_mlx.hub import find_model
from gm_mlx.train.rows import image_key
from gm_mlx.train.run_folder import SAMPLE, fingerprint

MODEL_CONFIGS = ("config.json", "processor_config.json")


def model_identity(model: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of a model's weights and of its adapters', as JSON values. A few megabytes are read.

    Args:
        model: as for ``vlm.open_engine``.
        options: as for ``vlm.open_engine``.

    Raises:
        UserError: the model or an adapter is not found, or a GGUF file is damaged.
    """
    from gm_mlx.lora.folder import ADAPTER_FILE, find_adapter
    from gm_mlx.weights import weight_files

    files = find_gguf(model, options.get("mmproj"), options.get("gguf_file"))
    if files is not None:
        from gm_mlx.llama.check import part_paths

        weights = _of_gguf([*part_paths(files.model), *([files.mmproj] if files.mmproj else [])])
    else:
        folder = find_model(model)
        digest = hashlib.blake2b(_of_safetensors(weight_files(folder)).encode(), digest_size=16)
        for name in MODEL_CONFIGS:
            if (folder / name).is_file():
                digest.update((folder / name).read_bytes())
        weights = digest.hexdigest()
    found = [(find_adapter(name) / ADAPTER_FILE, weight) for name, weight in options.get("adapters") or ()]
    adapters = [[_of_safetensors([file]), weight] for file, weight in found]
    adapters += [[_of_gguf([Path(name)]), weight] for name, weight in options.get("lora") or ()]
    return {"weights": weights, "adapters": adapters}


def _of_safetensors(paths: Sequence[Path]) -> str:
    try:
        return fingerprint(paths)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error) as error:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: cannot be read as safetensors ({error}); fetch or convert the model again") from None


def _of_gguf(paths: Iterable[Path]) -> str:
    """A hash of GGUF files: of all that stands in front of the tensors, and of the first bytes of each tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        tensors = read_header(path).tensors.values()
        with open(path, "rb") as file:
            digest.update(file.read(min((tensor.offset for tensor in tensors), default=-1)))
            for tensor in tensors:
                file.seek(tensor.offset)
                digest.update(file.read(min(SAMPLE, tensor.nbytes)))
    return digest.hexdigest()


def questions_identity(questions: Sequence[Question]) -> str:
    """A hash of all that is asked, in its order. Images count by their names without the folder."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        image = question.image
        name = None if image is None else Path(image).name if isinstance(image, str) else image_key(image)
        digest.update(json.dumps([question.id, question.text, name]).encode() + b"\n")
    return digest.hexdigest()
