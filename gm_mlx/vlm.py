"""The Python API: load a model, ask about images, hold a conversation.

import gm_mlx

model = gm_mlx.load()
print(model.chat("What colour is the circle?", images=["shapes.png"]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gm_mlx.engine import Engine, Piece, Sampling, Stats
from gm_mlx.errors import UserError
from gm_mlx.hub import find_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.images import ImageSource
    from gm_mlx.processor import Message


@dataclass(frozen=True)
class Answer:
    """A finished answer; ``str(answer)`` and ``print(answer)`` give its text."""

    text: str
    stats: Stats

    def __str__(self) -> str:
        return self.text


# Options of the engine on llama.cpp alone, and of MLX alone, by the names that the command line gives them.
LLAMA_OPTIONS = {
    "n_ctx": "--context",
    "threads": "--threads",
    "gpu_layers": "--n-gpu-layers",
    "lora": "--lora",
    "repack": "--repack",
}
MLX_OPTIONS = {"dtype": "dtype", "max_kv_size": "--max-kv-size"}


def open_engine(
    model: str | None = None, *, mmproj: str | None = None, gguf_file: str | None = None, **options: Any
) -> Engine:
    """Find a model and load it into the engine that runs it: GGUF files into llama.cpp, model folders into MLX.

    Args:
        model: see ``find_model`` and ``find_gguf``.
        mmproj: of a GGUF model, the file of its vision model; by default one beside it.
        gguf_file: which of a folder's or repository's GGUF files, such as "Q8_0".
        options: passed to the engine; see ``MLXEngine`` and ``LlamaCppEngine``.

    Raises:
        UserError: the model is not found or not sound, or an option is out of range or for the other engine.
    """
    from gm_mlx.gguf_files import find_gguf

    files = find_gguf(model, mmproj, gguf_file)
    if files is None:
        _refuse(options, LLAMA_OPTIONS, "GGUF files, and this is a model folder")
        folder = find_model(model)
        from gm_mlx.mlx_engine import MLXEngine

        options.pop("show_log", None)
        return MLXEngine(folder, model_name=model or folder.name, **options)
    if options.pop("adapters", None):
        raise UserError(
            f"--adapter is for MLX, and this is a GGUF file; run `gm-mlx convert ADAPTER --to gguf-lora --base "
            f"{files.model} -o ADAPTER.gguf` and give that with --lora"
        )
    _refuse(options, MLX_OPTIONS, "MLX, and this is a GGUF file")
    from gm_mlx.llama.engine import LlamaCppEngine

    return LlamaCppEngine(files.model, files.mmproj, model_name=model, **options)


def _refuse(options: dict[str, Any], names: dict[str, str], what: str) -> None:
    for name, option in names.items():
        if options.get(name) is not None:
            raise UserError(f"{option} is for {what}; leave it out")


def load(model: str | None = None, **options: Any) -> VLM:
    """Load a model: ``gm_mlx.load()`` takes the one in the box. See ``open_engine`` for arguments and errors."""
    return VLM(open_engine(model, **options))


class VLM:
    """A loaded model that answers questions about images."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def stream(
        self, prompt: str | Sequence[Message], images: Sequence[ImageSource] = (), **sampling: Any
    ) -> Iterator[Piece]:
        """Answer, piece by piece.

        Args:
            prompt: a question, or a conversation as a list of messages of which the last is the user's.
            images: paths, contents of image files, or PIL images.
            sampling: the fields of ``Sampling``, such as ``max_tokens`` and ``temperature``.

        Raises:
            UserError: an image cannot be read, the conversation is malformed, or it does not fit the context.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.engine.stream(messages, [self.engine.open_image(image) for image in images], Sampling(**sampling))

    def chat(self, prompt: str | Sequence[Message], images: Sequence[ImageSource] = (), **sampling: Any) -> Answer:
        """Answer in one go; arguments and errors as for ``stream``."""
        pieces = list(self.stream(prompt, images, **sampling))
        return Answer("".join(piece.text for piece in pieces), pieces[-1].stats)

    def conversation(self, system: str | None = None) -> Conversation:
        """A new conversation with the model."""
        return Conversation(self.engine, system)

    def close(self) -> None:
        """Give back the memory. The model cannot be used afterwards."""
        self.engine.close()


class Conversation:
    """Messages and images that grow turn by turn.

    Attributes:
        messages: the conversation so far; every question in it has its answer.
        images: its images, in the order of their slots.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def ask(self, prompt: str, images: Sequence[ImageSource] = (), sampling: Sampling | None = None) -> Iterator[Piece]:
        """Ask the next question.

        The question and its answer join the conversation when the iterator ends. If it is closed or interrupted, what
        was said up to there joins it; a question that got no word of an answer, or an error, does not.

        Args:
            prompt: the question.
            images: images that the question brings along.
            sampling: how tokens are chosen.

        Raises:
            UserError: as for ``VLM.stream``; the conversation stays as it was.
        """
        opened = [self.engine.open_image(image) for image in images]
        slots = [{"type": "image"} for _ in opened]
        question = {"role": "user", "content": [*slots, {"type": "text", "text": prompt}]}
        pieces = self.engine.stream(
            [*self.messages, question], [*self.images, *opened], sampling if sampling is not None else Sampling()
        )
        return self._listen(question, opened, pieces)

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages: list[Message] = list(self._system)
        self.images: list[Image] = []

    def _listen(self, question: Message, opened: list[Image], pieces: Iterator[Piece]) -> Iterator[Piece]:
        answer = ""
        finished = False
        try:
            for piece in pieces:
                answer += piece.text
                finished = piece.stats.finish_reason is not None
                yield piece
        finally:
            if answer or finished:
                self.messages += [question, {"role": "assistant", "content": answer}]
                self.images += opened
