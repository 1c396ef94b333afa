"""What a bench needs of an engine: more than answers, since an answer ends when the model likes.

Each engine's own class is extended by these few members, so that what is measured is the code that answers users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.chat_template import Message
    from gm_mlx.images import ImageSource

QUESTION = "What is in this picture?"
MESSAGES: list[Message] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
]


class Asked(NamedTuple):
    """A question about an image, up to the first token of its answer.

    Attributes:
        encode_seconds: what the image took of the time.
        depth: positions that are in the cache now.
    """

    encode_seconds: float
    depth: int


class Subject(Protocol):
    """An engine that can be measured.

    Attributes:
        context_length: positions that it has at most.
        vocab_size: token ids begin at 0 and end before this.
        reads_images: whether ``ask`` can be called.
    """

    context_length: int
    vocab_size: int
    reads_images: bool

    def prefill(self, ids: Sequence[int]) -> None:
        """Read a prompt, from an empty cache up to the logits of its last token."""
        ...

    def decode(self, ids: Sequence[int]) -> None:
        """Compute tokens one after the other, behind what the cache holds; the ids are given, and none is chosen."""
        ...

    def ask(self, image: Image) -> Asked:
        """Read an image that was never seen before and a question, from an empty cache, and choose one token."""
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def open_image(self, source: ImageSource) -> Image:
        """See ``gm_mlx.engine.Engine.open_image``."""
        ...

    def runtime_peak(self) -> int | None:
        """Bytes that the engine's own allocator had at most since the last call; None where it does not tell."""
        ...

    def facts(self) -> dict[str, Any]:
        """What computes: "device", and what else the engine knows about that."""
        ...
