"""The engine on MLX, made measurable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from gm_mlx import _blas
from gm_mlx.bench.subject import MESSAGES, Asked
from gm_mlx.engine import Sampling
from gm_mlx.generate import prefill
from gm_mlx.mlx_engine import MLXEngine
from gm_mlx.weights import runs_on_cpu

if TYPE_CHECKING:
    from PIL.Image import Image


class MLXSubject(MLXEngine):
    """``gm_mlx.bench.subject.Subject`` on MLX."""

    reads_images = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.vocab_size = self._model.config.text_config.vocab_size

    def prefill(self, ids: Sequence[int]) -> None:
        """See ``Subject.prefill``."""
        self.reset()
        # A random id that happens to mean an image would ask for features.
        tokens = np.array([[0 if token == self.processor.image_token_id else token for token in ids]])
        prefill(self._model, self._model.embed(tokens), self._cache, self._prefill_chunk)

    def decode(self, ids: Sequence[int]) -> None:
        """See ``Subject.decode``. As in ``gm_mlx.generate.decode``, one token is begun before the last is done."""
        following = self._begin(ids[0])
        for token in ids[1:]:
            logits, following = following, self._begin(token)
            mx.eval(logits)
        mx.eval(following)

    def ask(self, image: Image) -> Asked:
        """See ``Subject.ask``."""
        self.reset()
        stats = list(self.stream(MESSAGES, [image], Sampling(max_tokens=1)))[-1].stats
        return Asked(stats.encode_seconds, stats.prompt_tokens)

    def runtime_peak(self) -> int | None:
        """See ``Subject.runtime_peak``."""
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak

    def facts(self) -> dict[str, Any]:
        """See ``Subject.facts``."""
        name = mx.device_info().get("device_name", "unnamed")
        if runs_on_cpu():
            return {"device": "CPU", "threads": os.cpu_count(), "blas": _blas.status()}
        return {"device": f"GPU ({name})"}

    def _begin(self, token: int) -> mx.array:
        """Logits [1, 1, V] after one more token; lazy, and on their way."""
        logits = self._model(mx.array([[token]]), self._cache)
        mx.async_eval(logits)
        return logits
