"""The engine on llama.cpp, made measurable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gm_mlx.bench.subject import MESSAGES, Asked
from gm_mlx.engine import Sampling
from gm_mlx.llama.binding import library
from gm_mlx.llama.check import check_mmproj, check_text_model
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.llama.probe import layout_notice
from gm_mlx.llama.trial import check_by_trial

if TYPE_CHECKING:
    from PIL.Image import Image


class LlamaSubject(LlamaCppEngine):
    """``gm_mlx.bench.subject.Subject`` on llama.cpp."""

    def __init__(self, path: Path, mmproj: Path | None, threads: int | None, gpu_layers: int | None) -> None:
        super().__init__(path, mmproj, threads=threads, gpu_layers=gpu_layers)
        self._gpu_layers = gpu_layers
        self._depth = 0
        self.reads_images = mmproj is not None
        self.vocab_size = library().llama_vocab_n_tokens(self._model.vocab)

    def prefill(self, ids: Sequence[int]) -> None:
        """See ``Subject.prefill``."""
        self._grow(len(ids))
        self.reset()
        context = self._open()
        for start in range(0, len(ids), context.chunk):
            context.decode(ids[start : start + context.chunk], start)
        context.logits()  # which waits until they are computed
        self._depth = len(ids)

    def decode(self, ids: Sequence[int]) -> None:
        """See ``Subject.decode``."""
        context = self._open()
        for token in ids:
            context.decode([token], self._depth)
            context.logits()
            self._depth += 1

    def ask(self, image: Image) -> Asked:
        """See ``Subject.ask``."""
        self.reset()
        stats = list(self.stream(MESSAGES, [image], Sampling(max_tokens=1)))[-1].stats
        self._depth = self._position
        return Asked(stats.encode_seconds, stats.prompt_tokens)

    def reset(self) -> None:
        """See ``Subject.reset``."""
        super().reset()
        self._depth = 0

    def runtime_peak(self) -> int | None:
        """See ``Subject.runtime_peak``."""
        return None

    def facts(self) -> dict[str, Any]:
        """See ``Subject.facts``."""
        gpu = self._gpu_layers != 0 and library().llama_supports_gpu_offload()
        return {"device": "GPU" if gpu else "CPU", "threads": self._threads, "gpu_layers": self._gpu_layers}


def make_ready(path: Path, mmproj: Path | None) -> None:
    """Find out what is found out once for each file and each build of llama.cpp, so that loading is loading."""
    vision = check_mmproj(mmproj) if mmproj is not None else None
    check_by_trial(check_text_model(path), vision)
    if vision is not None:
        layout_notice(vision, str(path))
