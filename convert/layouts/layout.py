"""What a layout is: one way in which checkpoints are written, as tables of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gm_mlx.source_names import Names


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints are written.

    Attributes:
        title: what people call it.
        marks: it is this layout if one tensor's name matches.
        names: the tensors; see ``gm_mlx.source_names`` for what they become.
        text: the key of ``config.json`` that holds the decoder's config; empty if that is the config itself.
        vision: the key that holds the tower's config; empty if only the tower's id is known.
        tower_id: the key with the tower's name on Hugging Face; empty if there is none.
        projector_type: the key with the projector's kind; empty if there is only one.
        feature_layer: the key that says which hidden state of the tower is read.
        feature_strategy: the key that says which of its positions.
        strategies: the values of that key, and Hugging Face's words for them.
        refused: config keys, each with the values with which a checkpoint can be converted.
        moe_kind: what two experts of a layer are: ``MoEConfig.kind``.
    """

    title: str
    marks: str
    names: Names
    text: str = ""
    vision: str = ""
    tower_id: str = ""
    projector_type: str = ""
    feature_layer: str = "mm_vision_select_layer"
    feature_strategy: str = "mm_vision_select_feature"
    strategies: Mapping[str, str] = field(default_factory=lambda: {"patch": "default", "cls_patch": "full"})
    refused: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    moe_kind: str = "experts"

    def matches(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names are of this layout."""
        return any(re.fullmatch(self.marks, name) for name in names)
