"""A GGUF file of gm-mlx as one side of a comparison (``gm_mlx.compare``): what llama.cpp makes of a question.

llama.cpp shows image features and logits, and nothing in between.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.gguf_file import read_header
from gm_mlx.llama.check import check_text_model
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.model import LlamaModel
from gm_mlx.llama.probe import LAYOUT_KEY
from gm_mlx.llama.prompt import OurPrompts
from gm_mlx.llama.vocab import Vocabulary
from gm_mlx.llama.worker import Worker
from gm_mlx.processor import Processor
from gm_mlx.stages import NO_TOKEN, Inputs, Limits, Precision, Trace

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DEFECT = (
    "with llama.cpp's defect (its issue 25814) the class token stands behind the patches and the first patch is lost: "
    "the features are moved back to where they belong, and this is not judged"
)
CENTRED = (
    "a decoder with LayerNorms and experts is written so that image features enter without their mean over channels, "
    "which these norms take out anyway: this is not judged"
)


class GGUFSide:
    """A model.gguf with its mmproj.gguf, both written by gm-mlx."""

    def __init__(self, name: str, path: Path, mmproj: Path) -> None:
        self.name = name
        self.path, self.mmproj = path, mmproj
        header = read_header(path)
        if "gm.config" not in header.metadata:
            raise UserError(
                f"{path}: was not written by gm-mlx, so there is nothing that it is a form of; compare files of "
                "`gm-mlx convert --to gguf`"
            )
        try:
            self.config: ModelConfig = ModelConfig.from_dict(json.loads(header.metadata["gm.config"]))
        except ValueError:
            raise UserError(f"{path}: gm.config is not JSON; convert the model again") from None
        architecture = header.metadata["general.architecture"]
        self._native = architecture == "gemma"
        matrices = Counter(tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1)
        stored = matrices.most_common(1)[0][0]
        # It computes in float32, but keeps keys and values in float16 and has a GELU of that precision.
        self.precision = Precision(FLOATS.get(stored, "float16"), "float16", stored not in FLOATS)
        self._moved = read_header(mmproj).metadata.get(LAYOUT_KEY) == "cls_last"
        centred = {"projector": CENTRED} if architecture == "phimoe" else {}
        self.caveats: Mapping[str, str] = dict.fromkeys(("projector", "logits"), DEFECT) if self._moved else centred
        check_text_model(path)
        # Tokens are needed before and after the model is in memory.
        self._worker = Worker()
        self._tokens = LlamaModel(header, worker=self._worker, keep_spaces=True, vocab_only=True)
        self.processor: Processor = OurPrompts(header, Vocabulary(header, self._tokens.vocab)).processor

    def run(self, inputs: Sequence[Inputs], limits: Limits) -> tuple[Precision, list[Trace]]:
        """Loads the model and lets it read everything."""
        engine = LlamaCppEngine(self.path, self.mmproj)
        try:
            return self.precision, [self._trace(engine, each, limits) for each in inputs]
        finally:
            engine.close()

    def _trace(self, engine: LlamaCppEngine, inputs: Inputs, limits: Limits) -> Trace:
        out = Trace()
        images = self._images(inputs.pixels)
        if images:
            features = np.stack([engine.encode_image(image) for image in images]) / self._feature_scale()
            out.stages["projector"] = np.roll(features, 1, axis=1) if self._moved else features
        ids = np.where(inputs.ids[0] == NO_TOKEN, self.config.image_token_index, inputs.ids[0]).tolist()
        logits, out.answer = engine.answer_ids(ids, images, limits.max_tokens, limits.vocab_size, limits.stop_ids)
        out.stages["logits"] = logits[None, : limits.vocab_size]
        return out

    def _images(self, pixels: np.ndarray | None) -> list[Image.Image]:
        """The pictures that pixels [N, H, W, 3] were made of: llama.cpp normalises them itself."""
        if pixels is None:
            return []
        config = self.processor.image
        assert config is not None
        colours = np.rint((pixels * np.array(config.std) + np.array(config.mean)) * 255)
        return [Image.fromarray(each) for each in np.clip(colours, 0, 255).astype(np.uint8)]

    def _feature_scale(self) -> float:
        """What the file multiplies features by; see ``gm_mlx.convert.to_gguf.vision``."""
        root = self.config.text_config.hidden_size**0.5
        return (root if self.config.scale_image_features else 1.0) / (root if self._native else 1.0)
