"""What a model makes of a question, stage by stage: the material that ``gm_mlx.compare`` compares.

The stages are small (a decoder layer of LLaVA-GM-2B makes 5 MB of 640 positions), models are not: a ``Side`` loads
its model, runs it and lets it go, so that two of them need the memory of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from gm_mlx._mlx_lm import create_attention_mask
from gm_mlx.config import ModelConfig
from gm_mlx.engine import GREEDY
from gm_mlx.folder import read_model_folder
from gm_mlx.generate import decode, make_cache
from gm_mlx.processor import Processor
from gm_mlx.router import Routing
from gm_mlx.weights import load_model, runs_on_cpu

if TYPE_CHECKING:
    from gm_mlx.images import ImageSource
    from gm_mlx.model import Model

NO_TOKEN = -1  # stands for an image position: forms of one model may use different ids for it
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Precision:
    """How a model stores its numbers, and what it computes in: names such as "float32"."""

    stored: str
    computed: str
    quantized: bool = False


@dataclass(frozen=True)
class Question:
    """What both models read: a prompt and the images that it is about; each opens and preprocesses them its own way."""

    prompt: str
    images: Sequence[ImageSource] = ()


@dataclass(frozen=True)
class Inputs:
    """A question as a model reads it.

    Attributes:
        ids: int64 [1, L], with ``NO_TOKEN`` in image positions.
        pixels: float32 [N, H, W, 3], or None without images.
    """

    ids: np.ndarray
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Limits:
    """How an answer is made: its most tokens, ids that may be chosen are below ``vocab_size``, ids that end it."""

    max_tokens: int
    vocab_size: int
    stop_ids: frozenset[int]


@dataclass
class Trace:
    """What a model makes of a question.

    Attributes:
        stages: float32 arrays by stage, in the order of computation.
        experts: chosen experts [L, k] by sparse layer.
        answer: ids of the greedy answer, without the one that ends it.
    """

    stages: dict[str, np.ndarray] = field(default_factory=dict)
    experts: dict[int, np.ndarray] = field(default_factory=dict)
    answer: list[int] = field(default_factory=list)


class Side(Protocol):
    """One of the two models; nothing large is in memory before ``run`` and after it.

    ``config`` is None where only the model itself can tell, ``processor`` where the other side's is used. ``caveats``
    says of which stages it is known that they differ, and why.
    """

    name: str
    caveats: Mapping[str, str]

    @property
    def config(self) -> ModelConfig | None: ...

    @property
    def processor(self) -> Processor | None: ...

    def run(self, inputs: Sequence[Inputs], limits: Limits) -> tuple[Precision, list[Trace]]: ...


class FolderSide:
    """A gm-mlx model folder, quantized or not."""

    caveats: Mapping[str, str] = {}

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.config: ModelConfig = ModelConfig.load(folder)
        self.processor: Processor = Processor.from_folder(folder)
        tensors = read_model_folder(folder)
        stored = DTYPE_NAMES[tensors["language_model.model.norm.weight"].dtype]
        computed = "float32" if runs_on_cpu() else stored
        self.precision = Precision(stored, computed, any(name.endswith(".scales") for name in tensors))

    def run(self, inputs: Sequence[Inputs], limits: Limits) -> tuple[Precision, list[Trace]]:
        """Loads the model and lets it read everything."""
        model = load_model(self.folder)
        traces = [trace(model, each, limits) for each in inputs]
        del model
        mx.clear_cache()
        return self.precision, traces


def trace(model: Model, inputs: Inputs, limits: Limits) -> Trace:
    """Run one question through a model and keep what every stage makes of it."""
    out = Trace()
    features = None
    if inputs.pixels is not None:
        tower = model.vision_tower(mx.array(inputs.pixels))
        out.stages["tower"] = _numpy(tower)
        features = model.project(tower)
        out.stages["projector"] = _numpy(features)
    image_token = model.config.image_token_index
    ids = np.where(inputs.ids == NO_TOKEN, image_token, inputs.ids)
    x, positions = model.embed(ids, features), model.positions(ids)
    out.stages["embeddings"] = _numpy(x)
    cache = make_cache(model)
    mask = create_attention_mask(x, cache[0])
    for i, block in enumerate(model.layers):
        routing: list[Routing] = []
        x = block(x, mask, cache[i], routing, positions)
        out.stages[f"layer {i}"] = _numpy(x)  # evaluated layer by layer, so that no graph of all of them grows
        out.experts.update({r.layer: np.array(r.experts[0]) for r in routing})
    x = model.language_model.model.norm(x)
    out.stages["norm"] = _numpy(x)
    logits = model.logits(x[:, -1:])[:, 0]  # [1, V]
    out.stages["logits"] = _numpy(logits)[:, : limits.vocab_size]
    sampling = replace(GREEDY, max_tokens=limits.max_tokens)
    answer = decode(
        model,
        logits,
        cache,
        sampling,
        vocab_size=limits.vocab_size,
        banned=[image_token],
        positions=positions.next_token(),
    )
    for token in answer:
        if token in limits.stop_ids:
            break
        out.answer.append(token)
    return out


def make_inputs(processor: Processor, question: Question) -> Inputs:
    """What a model reads of a question."""
    prompt = processor.encode([{"role": "user", "content": question.prompt}], len(question.images))
    ids = np.array([prompt.ids], np.int64)
    pixels = processor.pixels(question.images) if question.images else None
    return Inputs(np.where(ids == processor.image_token_id, NO_TOKEN, ids), pixels)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
