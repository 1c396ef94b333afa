"""How large a model is by a recipe, component by component, from its config and quantization table alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gm_mlx.config import ModelConfig
from gm_mlx.footprint import planned_bytes
from gm_mlx.inventory import COMPONENTS, model_layers

ENTRY_BYTES = 110  # more than a tensor's entry in a safetensors header takes, its layer's path apart


class Size(NamedTuple):
    """Weights and the bytes that they take in a file.

    Attributes:
        parameters: weights, counted before they were packed.
        bytes: with the scales and biases of quantized groups.
    """

    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def component_sizes(
    config: ModelConfig, table: Mapping[str, Any] | None = None, dtype: str = "float16"
) -> dict[str, Size]:
    """Sizes by component of ``gm_mlx.inventory``; a component that the model does not have is left out.

    Args:
        config: the model's config; a quantization table in it is ignored.
        table: mlx-lm's quantization table, with an entry for each layer that its defaults are not for; None for none.
        dtype: "float16", "bfloat16" or "float32" for what is not packed. Routers are float32 in any case.
    """
    layers = model_layers(config)
    num_bytes = planned_bytes(layers, table, dtype)
    sizes = {}
    for component in COMPONENTS:
        own = [layer for layer in layers if layer.component == component]
        if own:
            sizes[component] = Size(sum(layer.total for layer in own), sum(num_bytes[layer.path] for layer in own))
    return sizes


def total(sizes: Mapping[str, Size]) -> Size:
    """The size of all components together."""
    return Size(sum(size.parameters for size in sizes.values()), sum(size.bytes for size in sizes.values()))


def file_bytes(config: ModelConfig, table: Mapping[str, Any] | None = None) -> int:
    """Most that the weights take as files, in half precision where they are not packed.

    Counted with each file's header as it would be if every layer that can be were packed.
    """
    entries = [
        (len(layer.arrays) + 2 * layer.quantizable) * (len(layer.path) + ENTRY_BYTES) for layer in model_layers(config)
    ]
    return total(component_sizes(config, table)).bytes + sum(entries) + ENTRY_BYTES
