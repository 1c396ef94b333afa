"""The engine protocol: all that the command line, the Python API and a server ever talk to.

An engine is given the whole conversation each time and finds out by itself how much of it it has already seen: it keeps
the key/value cache of its last prompt and prefills only what differs from there on. So callers hold no state, and an
engine on another runtime fits behind the same few members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from gm_mlx.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.images import ImageConfig, ImageSource
    from gm_mlx.processor import Message

FinishReason = Literal["stop", "length"]

Progress = Callable[[str, int, int], None]
"""Told the phase ("load", "encode" or "prefill"), what is done and the whole: bytes, images or positions."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding.

    Attributes:
        max_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token; the options below then do nothing but the penalty.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep this many tokens; 0 keeps all.
        min_p: keep tokens at least this likely, relative to the likeliest.
        repetition_penalty: above 1 makes tokens of the last ``repetition_context`` less likely.
        seed: makes sampling repeatable.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "repetition_context": (self.repetition_context >= 1, "1 or more"),
        }
        for name, (valid, rule) in allowed.items():
            if not valid:
                raise UserError(f"{name}: {getattr(self, name)} is not {rule}")


GREEDY = Sampling()


@dataclass
class Stats:
    """Counts and times of one answer; they grow while it is generated.

    ``prompt_tokens`` counts the whole prompt, image positions and cached positions included. ``image_tokens`` and
    ``cached_tokens`` say how many of these stand for images and how many were not computed again.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    images_encoded: int = 0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0
    finish_reason: FinishReason | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def seconds_to_first_token(self) -> float:
        return self.encode_seconds + self.prefill_seconds


@dataclass(frozen=True)
class Piece:
    """Newly finished text of an answer, never half a character, with the counts so far."""

    text: str
    stats: Stats


class Engine(Protocol):
    """A loaded model that streams answers.

    Attributes:
        name: the runtime, "mlx" or "llama.cpp".
        model: the model's name, as a user would pass it.
        context_length: positions that the model was made for.
        image_config: how images become pixels; None where it reads none, or where llama.cpp decides.
    """

    name: str
    model: str
    context_length: int
    image_config: ImageConfig | None

    def stream(
        self,
        messages: Sequence[Message],
        images: Sequence[Image] = (),
        sampling: Sampling = GREEDY,
    ) -> Iterator[Piece]:
        """Answer the last message of a conversation.

        Args:
            messages: the conversation, oldest first; the last one is the user's.
            images: decoded RGB images of the whole conversation, in the order of their slots.
            sampling: how tokens are chosen.

        Yields:
            Pieces of text. The last piece has ``stats.finish_reason`` set; its text may be empty.

        Raises:
            UserError: images and slots differ in number, or the prompt does not fit the context.
        """
        ...

    def open_image(self, source: ImageSource) -> Image:
        """Decode an image as the model wants it: RGB and upright; raises ``UserError`` that names the file."""
        ...

    def notices(self, images: Sequence[Image] = ()) -> list[str]:
        """Lines that a user should see, each returned once: about the engine, or about images like these."""
        ...

    def close(self) -> None:
        """Give back the memory that the engine holds. It cannot be used afterwards."""
        ...
