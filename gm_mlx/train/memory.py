"""How much memory a step of training takes, before it is taken.

What is there at the peak:

- the weights as they are, and of each number that is trained itself, its gradient before and after it is clipped, and
  AdamW's two means, in float32;
- of each layer what its gradient needs. With gradient checkpointing that is one hidden state, and all of it for one
  layer only, when it is computed again;
- beside these the largest of what comes and goes: the gradients within a layer, a piece of the logits, or the tower, of
  which nothing is kept while it is frozen;
- Python, MLX and NumPy.

It counts arrays, so it is an estimate; ``examples/bench_lora_memory.py`` compares it with what is measured. What LoRA
itself keeps, a few numbers of its rank for each position, is left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from gm_mlx import cpu
from gm_mlx.config import ModelConfig, TextConfig
from gm_mlx.footprint import RUNTIME_BYTES, SINGLE, planned_bytes
from gm_mlx.inventory import model_layers
from gm_mlx.lora.layers import LowRank
from gm_mlx.model import Model
from gm_mlx.train.config import TrainConfig
from gm_mlx.train.cross_entropy import rows_at_a_time
from gm_mlx.train.dataset import Dataset
from gm_mlx.train.loader import MULTIPLE
from gm_mlx.train.precision import FACTORS
from gm_mlx.weights import DTYPES, PACKED, named_arrays, quantized_layers

FOUR_BITS = {"group_size": 64, "bits": 4}
STATES = 5  # numbers for each that is trained
WORTH = 0.95  # a way that leaves more than this share is none
PIECES = 4  # of logits: themselves and their gradient, as NumPy's arrays and as MLX's
SERIES = 7  # arrays as wide as a network within, of PanGu's first layers: a second gate, its activation, sums
GRIDS = 80  # hidden states for each feature of an image in LDP's convolutions, as measured
ENDS = 6  # hidden states before the first layer and behind the last one: embeddings, image features, the norm


class Kept(NamedTuple):
    """Arrays of a layer that stay until its gradient is known.

    Attributes:
        hidden: as wide as the hidden state.
        queries: as wide as all queries.
        keys: as wide as all keys.
        scores: of attention, all queries by all keys.
        inner: as wide as a dense network within.
        expert: as wide as an expert within, for each that a position goes to.
        gelu: more of these two where the activation is a GELU.
        moved: as wide as the hidden state, for each expert that a position goes to.
        again: how often all that a dense layer keeps is there beside it while gradients are computed.
    """

    hidden: int
    queries: int
    keys: int
    scores: int
    inner: int
    expert: int
    gelu: int
    moved: int
    again: int


# gm_mlx.cpu: of a network what the matrices up and gate give, and of attention no scores. What comes and goes was
# measured: NumPy's temporaries, and freed memory that the system has not got back yet.
FAST = Kept(hidden=7, queries=4, keys=3, scores=0, inner=2, expert=2, gelu=0, moved=0, again=3)
# MLX's own layers, as on a GPU: each step of an activation, of attention and of a norm, which is float32.
STOCK = Kept(hidden=6, queries=2, keys=3, scores=1, inner=5, expert=5, gelu=2, moved=2, again=1)
# What gm_mlx.cpu leaves to MLX, which then keeps every step, as it evaluates while it follows the gradient. Measured.
UNGATED = FAST._replace(expert=17)
DROPOUT = Kept(hidden=16, queries=8, keys=8, scores=0, inner=14, expert=26, gelu=0, moved=0, again=1)
DORA = DROPOUT._replace(inner=29, expert=36)


def training_bytes(
    config: ModelConfig,
    weights_bytes: int,
    trained: int,
    *,
    rows: int,
    length: int,
    checkpoint: bool,
    learnt: int | None = None,
    images: int | None = None,
    number: int = SINGLE,
    kept: Kept | None = None,
    tower: bool = False,
) -> int:
    """Estimate of the most memory that a process has while it trains.

    Args:
        config: the model.
        weights_bytes: all parameters that are not trained, as they are in memory.
        trained: numbers that are trained: whole matrices or LoRA's.
        rows: that are computed at a time.
        length: positions of each, padding included.
        checkpoint: whether with gradient checkpointing.
        learnt: positions of all these rows that are learnt; all of them by default.
        images: of all these rows; one in each by default.
        number: bytes of a number in activations.
        kept: what layers keep; what those of gm_mlx.cpu do by default.
        tower: whether the tower is trained, too.
    """
    text, positions = config.text_config, rows * length
    kept = kept or (FAST if text.gated else UNGATED)
    layers = [layer_numbers(text, layer, length, kept) for layer in range(text.num_hidden_layers)]
    hidden = text.hidden_size
    numbers = ENDS * hidden + (hidden * len(layers) + max(layers) if checkpoint else sum(layers))
    images = rows if images is None else images
    pictures = images * tower_numbers(config, kept)
    activations = positions * numbers + (config.num_vision_layers_used * pictures if tower else 0)
    if config.projector_type == "ldpnet":
        activations += images * config.num_image_features * GRIDS * hidden
    moments = [
        positions * kept.again * min(layers),
        PIECES * text.vocab_size * min(learnt or positions, rows_at_a_time(text.vocab_size, 0)),
        pictures,
    ]
    return weights_bytes + STATES * SINGLE * trained + number * (activations + max(moments)) + RUNTIME_BYTES


def layer_numbers(text: TextConfig, layer: int, length: int, kept: Kept) -> int:
    """Numbers that a decoder layer keeps for each position."""
    moe = text.moe if layer in text.sparse_layers else None
    gelu = kept.gelu * ("gelu" in text.hidden_act)
    queries = text.num_attention_heads * text.head_dim
    dense = (kept.inner + gelu + SERIES * (layer < text.series_layers)) * text.intermediate_size
    if moe is None:
        network = dense
    elif moe.kind == "evf":  # in training both are computed
        network = 2 * dense
    else:
        width = moe.expert_size or text.intermediate_size
        expert = (kept.expert + gelu) * width + kept.moved * text.hidden_size
        network = moe.top_k * expert + moe.use_residual * dense
    attention = kept.queries * queries + kept.keys * text.num_key_value_heads * text.head_dim
    return kept.hidden * text.hidden_size + attention + kept.scores * text.num_attention_heads * length + network


def tower_numbers(config: ModelConfig, kept: Kept) -> int:
    """Numbers of an image that a layer of the tower has at a time, or keeps if it is trained."""
    vision = config.vision_config
    positions, size = vision.num_patches + vision.is_clip, vision.hidden_size
    attention = (kept.queries + kept.keys) * size + kept.scores * vision.num_attention_heads * positions
    return positions * (kept.hidden * size + attention + (kept.inner + kept.gelu) * vision.intermediate_size)


@dataclass(frozen=True)
class Demand:
    """What a run has to compute at a time; the attributes are the arguments of ``training_bytes``."""

    config: ModelConfig
    weights_bytes: int
    trained: int
    rows: int
    length: int
    checkpoint: bool
    learnt: int
    images: int
    number: int
    kept: Kept | None
    tower: bool

    @classmethod
    def of(cls, model: Model, dataset: Dataset, config: TrainConfig, batch_size: int, ranks: int = 1) -> Demand:
        """The largest part of a step.

        Args:
            model: with what is trained not frozen.
            dataset: the rows.
            config: hyperparameters.
            batch_size: rows of a step, over all parts and ranks.
            ranks: processes that share a step.
        """
        arrays, trained = named_arrays(model), trained_arrays(model)
        # Those are their own masters.
        own = sum(array.nbytes for array in trained.values() if array.dtype == mx.float32)
        used = model.language_model.dtype if config.precision == "auto" else DTYPES[config.precision]
        longest = int(dataset.lengths.max())
        cast = 0 if config.precision == "auto" else _cast_bytes(model, used)
        rows = -(-min(batch_size, len(dataset)) // (config.accumulate * ranks))
        return cls(
            config=model.config,
            weights_bytes=sum(array.nbytes for array in arrays.values()) - own + cast,
            trained=sum(array.size for array in trained.values()),
            rows=rows,
            length=longest + -longest % MULTIPLE,
            checkpoint=config.checkpoint,
            learnt=rows * int(dataset.answer_lengths.max()),
            images=rows * int(np.diff(dataset.slot_starts).max()),
            number=SINGLE if cpu.is_fast(model) else used.size,
            kept=_kept(model),
            tower=any(name.startswith("vision_tower") for name in trained),
        )

    @property
    def bytes(self) -> int:
        """See ``training_bytes``."""
        return training_bytes(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def trained_arrays(model: Model) -> dict[str, mx.array]:
    """What is trained of a model, by name."""
    return dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]


def _kept(model: Model) -> Kept | None:
    """What a model's layers keep; see ``training_bytes``."""
    if not cpu.is_fast(model):
        return STOCK
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    if any("magnitude" in one for one in adapters):
        return DORA
    return DROPOUT if any(one.dropout_rate for one in adapters) else None


def _cast_bytes(model: Model, dtype: mx.Dtype) -> int:
    """What a model's floats take in another precision, beside what they are."""
    stay = {f"{path}.{name}" for path in quantized_layers(model) for name in PACKED}
    sizes = (
        array.size
        for name, array in named_arrays(model).items()
        if name not in stay and name.rpartition(".")[2] not in FACTORS and array.dtype != dtype
    )
    return dtype.size * sum(sizes)


def savings(demand: Demand, model: Model, dataset: Dataset, config: TrainConfig) -> tuple[list[tuple[str, int]], int]:
    """What a run could do to need less memory.

    Args:
        demand: of the run.
        model: its model.
        dataset: its rows.
        config: its hyperparameters.

    Returns:
        Options of the commands with the bytes that are needed then, what helps most first; and those with all of them.
    """
    ways: dict[str, dict[str, Any]] = {}
    if not demand.checkpoint:
        ways["--grad-checkpoint"] = {"checkpoint": True}
    if demand.rows > 1:  # one row at a time
        alone = {key: -(-getattr(demand, key) // demand.rows) for key in ("rows", "learnt", "images")}
        ways[f"--accumulate {config.accumulate * demand.rows}"] = alone
    median = int(np.median(dataset.lengths))  # half of the rows stay whole
    ways[f"--max-length {median}"] = {"length": median, "learnt": min(demand.learnt, demand.rows * median)}
    if not quantized_layers(model) and all(name.rpartition(".")[2] in FACTORS for name in trained_arrays(model)):
        dtype = "float32" if cpu.is_fast(model) else "float16"
        ways["a model in 4 bits (gm-mlx quantize)"] = {
            "weights_bytes": sum(planned_bytes(model_layers(model.config), FOUR_BITS, dtype).values())
        }
    found = {way: dataclasses.replace(demand, **changes).bytes for way, changes in ways.items()}
    useful = sorted((pair for pair in found.items() if pair[1] < WORTH * demand.bytes), key=lambda pair: pair[1])
    every: dict[str, Any] = {}
    for way, _ in useful:
        every |= {key: min(value, every.get(key, value)) for key, value in ways[way].items()}
    return useful, dataclasses.replace(demand, **every).bytes
