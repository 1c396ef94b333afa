"""What is measured: a model in one of its forms, and what its files say about the work that a token takes.

Decoding reads every weight that a token uses once, and does little else, so the bytes of these weights tell how fast
one form must be when the speed of another is known. Reading a prompt is arithmetic: its FLOPs tell how busy the
processor was kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFTensor, read_header
from gm_mlx.gguf_files import find_gguf
from gm_mlx.hub import BUILT_IN, find_model

EXPERTS = "_exps."
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Of these, too, a token uses one row (Gemma 3n).
LOOKED_UP = (EMBEDDING, "per_layer_token_embd.weight")
NOT_FOR_TEXT = ("tower", "projector")


@dataclass(frozen=True)
class Costs:
    """What a form's files say.

    Attributes:
        weight_bytes: bytes of all its weights, those of the vision model included.
        active_bytes: bytes of the weights that one generated token uses.
        prefill_flops: FLOPs of reading a prompt of so many tokens of text.
    """

    weight_bytes: int
    active_bytes: int
    prefill_flops: Callable[[int], int]


@dataclass(frozen=True)
class Form:
    """A model in one of its forms.

    Attributes:
        name: what the user calls it.
        engine: what runs it, "mlx" or "llama.cpp".
        model: its folder or its GGUF file.
        mmproj: the GGUF file of its vision model, or None.
    """

    name: str
    engine: str
    model: Path
    mmproj: Path | None = None

    def costs(self) -> Costs:
        """Read the headers of its files; raises ``UserError`` where they are damaged."""
        return _mlx_costs(self.model) if self.engine == "mlx" else _gguf_costs(self.model, self.mmproj)


def find_form(name: str | None) -> Form:
    """A form by name, as ``gm_mlx.vlm.open_engine`` finds it.

    Args:
        name: a model folder, a ``.gguf`` file, a folder or repository with either; None for the model in the box.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    files = find_gguf(name)
    if files is not None:
        return Form(str(name), "llama.cpp", files.model, files.mmproj)
    return Form(name or BUILT_IN, "mlx", find_model(name))


def _mlx_costs(folder: Path) -> Costs:
    from gm_mlx.config import ModelConfig
    from gm_mlx.folder import read_model_folder
    from gm_mlx.footprint import stored_bytes
    from gm_mlx.inventory import model_layers

    config = ModelConfig.load(folder)
    layers = model_layers(config)
    sizes = stored_bytes(layers, read_model_folder(folder))
    tied = config.text_config.tie_word_embeddings
    used = [
        layer
        for layer in layers
        if layer.component not in NOT_FOR_TEXT and (tied or not layer.path.endswith("embed_tokens"))
    ]
    active = sum(sizes[layer.path] * layer.chosen[0] // layer.chosen[1] for layer in used)
    return Costs(sum(sizes.values()), active, _counted_flops(config))


def _gguf_costs(model: Path, mmproj: Path | None) -> Costs:
    from gm_mlx.config import ModelConfig
    from gm_mlx.llama.check import part_paths

    first = read_header(model)
    parts = [first, *(read_header(part) for part in part_paths(model) if part != model)]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    vision = read_header(mmproj).tensors if mmproj is not None else {}
    arch = first.metadata.get("general.architecture")
    share = (first.metadata.get(f"{arch}.expert_used_count"), first.metadata.get(f"{arch}.expert_count"))
    active = sum(_used(name, tensors, tensor.nbytes, *share) for name, tensor in tensors.items())
    if "gm.config" in first.metadata:  # ours: count what the model needs, and not the zeros that fill llama.cpp's graph
        try:
            config = ModelConfig.from_dict(json.loads(first.metadata["gm.config"]))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{model}: gm.config is not the JSON of a config ({error}); convert the model again"
            ) from None
        flops = _counted_flops(config)
    else:
        flops = _product_flops(tensors, *share)
    return Costs(sum(tensor.nbytes for tensor in (*tensors.values(), *vision.values())), active, flops)


def _used(name: str, tensors: dict[str, GGUFTensor], amount: int, chosen: Any, experts: Any) -> int:
    """How much of a tensor's amount of anything one token uses."""
    if EXPERTS in name and isinstance(chosen, int) and isinstance(experts, int) and experts:
        return amount * chosen // experts
    # A table of embeddings is read as a whole only where it is the head as well.
    return 0 if name in LOOKED_UP and (name != EMBEDDING or HEAD in tensors) else amount


def _counted_flops(config: Any) -> Callable[[int], int]:
    from gm_mlx.footprint import count_flops
    from gm_mlx.inventory import model_layers

    def flops(tokens: int) -> int:
        counted = count_flops(config, model_layers(config), 0, tokens)
        return counted.decoder + counted.head

    return flops


def _product_flops(tensors: dict[str, GGUFTensor], chosen: Any, experts: Any) -> Callable[[int], int]:
    """For any model: products with its matrices alone, the head for one position. Attention's pairs are not counted."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items() if len(tensor.shape) > 1}
    used = {name: 2 * _used(name, tensors, size, chosen, experts) for name, size in sizes.items()}
    head = used.get(HEAD, used.get(EMBEDDING, 0))
    return lambda tokens: tokens * (sum(used.values()) - head) + head
