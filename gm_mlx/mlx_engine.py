"""The engine on MLX: Apple GPU, CUDA, or the CPU.

What it remembers between two calls is a key/value cache with the keys of all positions that were fed into it, and the
features of the last few images. Nothing else: each call brings the whole conversation, and the part that the cache
holds already is found by comparing keys (``gm_mlx.prefix``).

The keys are noted before the positions are computed, and the cache's own length says how many of them really were. So
an answer may be broken off at any point, by closing the iterator or with Ctrl-C, and the next call still knows exactly
what it can build on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from gm_mlx.engine import GREEDY, Piece, Progress, Sampling, Stats
from gm_mlx.errors import UserError
from gm_mlx.generate import decode, make_cache, prefill, trim_cache
from gm_mlx.images import image_hash
from gm_mlx.lora.folder import find_adapter, load_adapter
from gm_mlx.notice import ImageNotice
from gm_mlx.prefix import Key, prompt_keys, reusable
from gm_mlx.processor import Processor
from gm_mlx.router import Positions, Routing
from gm_mlx.weights import load_model, named_arrays, num_parameters, runs_on_cpu

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.images import ImageSource
    from gm_mlx.model import Model
    from gm_mlx.processor import Message

REMEMBERED_IMAGES = 16
LOAD_STEP_BYTES = 256 << 20
SLOW_ON_CPU = 1_500_000_000  # parameters from which MLX's CPU backend is no pleasure
SLOW_NOTICE = (
    "{model} has {billions:.1f} billion parameters, and MLX is slow at that on a CPU; "
    "its GGUF on llama.cpp will be far faster here"
)


class MLXEngine:
    """``gm_mlx.engine.Engine`` on MLX.

    Args:
        folder: a model folder.
        model_name: what the user calls the model; the folder's path by default.
        kv_bits: 4 or 8 for a quantized key/value cache.
        max_kv_size: most positions in the key/value cache; older ones are forgotten.
        prefill_chunk: prompt positions that are computed at a time.
        dtype: see ``load_model``.
        adapters: LoRA adapters that are at work together: folders or repositories, each alone or with a weight of
            which 1 is as it was trained.
        progress: told about loading, encoding and prefilling; see ``Progress``.

    Raises:
        UserError: the folder is no model folder, its files do not fit each other, an adapter is not for the model, or
            an option is out of range.
    """

    name = "mlx"

    def __init__(
        self,
        folder: str | Path,
        *,
        model_name: str | None = None,
        kv_bits: int | None = None,
        max_kv_size: int | None = None,
        prefill_chunk: int = 512,
        dtype: str | None = None,
        adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
        progress: Progress | None = None,
    ) -> None:
        folder = Path(folder)
        if prefill_chunk < 1:
            raise UserError(f"prefill_chunk: {prefill_chunk} is not 1 or more")
        self.model = model_name or str(folder)
        self._model = load_model(folder, dtype=dtype)
        for adapter in adapters:
            name, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
            load_adapter(self._model, find_adapter(str(name)), weight)
        self.processor = Processor.from_folder(folder)
        _check_processor(folder, self.processor, self._model)
        self.image_config = self.processor.image
        self.context_length = self._model.config.text_config.max_position_embeddings
        self._cache_options = {"kv_bits": kv_bits, "max_kv_size": max_kv_size}
        self._prefill_chunk = prefill_chunk
        self._progress = progress or (lambda phase, done, total: None)
        self._features: OrderedDict[str, mx.array] = OrderedDict()
        self.reset()
        self._image_notice = ImageNotice.from_folder(folder)
        self._pending_notices = self._find_notices()
        _set_up_backend()
        _read_weights(self._model, self._progress)

    def stream(
        self, messages: Sequence[Message], images: Sequence[Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Piece]:
        """See ``Engine.stream``. The arguments are checked at once, and nothing is computed before the first piece."""
        ids, keys, hashes = self._tokenize(messages, images)
        return self._answer(ids, keys, hashes, images, sampling)

    def trace_routing(self, messages: Sequence[Message], images: Sequence[Image] = ()) -> list[Routing]:
        """Which experts each position of a prompt goes to.

        Args:
            messages: the conversation, as for ``stream``.
            images: its images.

        Returns:
            One evaluated ``Routing`` per sparse layer, with arrays [1, L, ...] for a prompt of L positions.
        """
        ids, _, hashes = self._tokenize(messages, images)
        trace: list[Routing] = []
        embeddings = self._embed(ids, hashes, images, Stats())
        self._model.hidden(embeddings, trace=trace, positions=self._model.positions(np.array([ids])))
        mx.eval([routing[1:] for routing in trace])
        return trace

    def open_image(self, source: ImageSource) -> Image:
        """See ``Engine.open_image``."""
        return self.processor.open_image(source)

    def notices(self, images: Sequence[Image] = ()) -> list[str]:
        """See ``Engine.notices``."""
        lines, self._pending_notices = self._pending_notices, []
        return lines + self._image_notice.lines(images)

    def reset(self) -> None:
        """Forget the last conversation; image features are kept."""
        self._keys: list[Key] = []
        self._pictured = False
        self._cache = make_cache(self._model, **self._cache_options)

    def close(self) -> None:
        """See ``Engine.close``."""
        del self._model, self._cache
        self._features.clear()
        mx.clear_cache()

    def _tokenize(self, messages: Sequence[Message], images: Sequence[Image]) -> tuple[list[int], list[Key], list[str]]:
        """Token ids, keys and image hashes of a conversation that fits the context."""
        ids = self.processor.encode(messages, len(images)).ids
        if len(ids) >= self.context_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens but the model's context is {self.context_length}; shorten it, use "
                "fewer images or start a new conversation"
            )
        hashes = [image_hash(image) for image in images]
        return ids, prompt_keys(ids, self.processor.image_token_id, self.processor.tokens_per_image, hashes), hashes

    def _answer(
        self, ids: list[int], keys: list[Key], hashes: list[str], images: Sequence[Image], sampling: Sampling
    ) -> Iterator[Piece]:
        turn = self._turn = object()
        mx.reset_peak_memory()
        stats = Stats(prompt_tokens=len(ids), image_tokens=len(images) * self.processor.tokens_per_image)
        try:
            positions = self._model.positions(np.array([ids]))
            stats.cached_tokens = start = self._reuse(keys, bool(images))
            done = sum(isinstance(key, tuple) and key[1] == 0 for key in keys[:start])
            embeddings = self._embed(ids[start:], hashes[done:], images[done:], stats)
            began = perf_counter()
            logits = prefill(
                self._model,
                embeddings,
                self._cache,
                self._prefill_chunk,
                lambda done, total: self._progress("prefill", done, total),
                positions.part(start, len(ids)),
            )
            stats.prefill_seconds = perf_counter() - began
            for piece in self._decode(logits, ids, sampling, stats, positions.next_token()):
                yield piece
                if self._turn is not turn:
                    raise RuntimeError("another answer was begun on this engine before this one had ended")
        except Exception:
            if self._turn is turn:
                self.reset()
            raise

    def _decode(
        self, logits: mx.array, ids: list[int], sampling: Sampling, stats: Stats, positions: Positions
    ) -> Iterator[Piece]:
        answer = self.processor.answer_stream()
        tokens = decode(
            self._model,
            logits,
            self._cache,
            replace(sampling, max_tokens=min(sampling.max_tokens, self.context_length - len(ids))),
            vocab_size=self.processor.tokenizer.vocab_size,
            banned=[self.processor.image_token_id],
            history=ids,
            positions=positions,
        )
        text = ""
        began = perf_counter()
        for token in tokens:
            stats.decode_seconds += perf_counter() - began
            stats.generated_tokens += 1
            self._keys.append(token)
            text, stopped = answer.add(token)
            if stopped:
                stats.finish_reason = "stop"
                break
            if text:
                yield Piece(text, stats)
            began = perf_counter()
        else:
            stats.finish_reason = "length"
            text = answer.finish()
        stats.peak_memory_bytes = mx.get_peak_memory()
        yield Piece(text, stats)

    def _reuse(self, keys: list[Key], pictured: bool) -> int:
        """Cut the cache back to what it has in common with a prompt; returns the length of that.

        Args:
            keys: the prompt's.
            pictured: whether the prompt has images. Where that decides about the way through the model, text in front
                of the first image has other keys and values than the same text in a conversation without images.
        """
        moe = self._model.config.text_config.moe
        if moe is not None and moe.kind == "evf" and pictured != self._pictured:
            self.reset()
        self._pictured = pictured
        fed = min(layer.offset for layer in self._cache)
        start = reusable(self._keys[:fed], keys)
        if not trim_cache(self._cache, start):
            self.reset()
            start = 0
        self._keys = list(keys)
        return start

    def _embed(self, ids: list[int], hashes: Sequence[str], images: Sequence[Image], stats: Stats) -> mx.array:
        """Embeddings [1, L, D] of ids whose image slots are for ``images``; evaluated, as are the features."""
        began = perf_counter()
        features = [self._encode(digest, image, stats) for digest, image in zip(hashes, images, strict=True)]
        embeddings = self._model.embed(np.array([ids]), mx.stack(features) if features else None)
        mx.eval(embeddings)
        stats.encode_seconds = perf_counter() - began
        return embeddings

    def _encode(self, digest: str, image: Image, stats: Stats) -> mx.array:
        """Features [T, D] of one image. Images are encoded one by one, so that many need no more memory than one."""
        if digest not in self._features:
            pixels = mx.array(self.processor.pixels([image]))
            self._features[digest] = self._model.encode_images(pixels)[0]
            mx.eval(self._features[digest])
            stats.images_encoded += 1
            self._progress("encode", stats.images_encoded, stats.images_encoded)
        self._features.move_to_end(digest)
        features = self._features[digest]
        while len(self._features) > REMEMBERED_IMAGES:
            self._features.popitem(last=False)
        return features

    def _find_notices(self) -> list[str]:
        """What to tell the user at once."""
        if runs_on_cpu() and (count := num_parameters(self._model)) > SLOW_ON_CPU:
            return [SLOW_NOTICE.format(model=self.model, billions=count / 1e9)]
        return []


def _check_processor(folder: Path, processor: Processor, model: Model) -> None:
    """The processor and the model must mean the same by an image; else answers would be wrong without a word."""
    config = model.config
    pairs = [
        ("image_token_index", processor.image_token_id, config.image_token_index),
        ("tokens_per_image", processor.tokens_per_image, config.num_image_tokens),
        ("image.size", processor.image and processor.image.size, config.vision_config.image_size),
    ]
    for key, mine, theirs in pairs:
        if mine != theirs:
            raise UserError(
                f"{folder / 'processor_config.json'}: {key} is {mine} where config.json has {theirs}; "
                "convert the model again"
            )
    tokens, rows = processor.tokenizer.vocab_size, config.text_config.vocab_size
    if tokens > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokens} tokens where config.json's vocab_size is {rows}; "
            "convert the model again"
        )


def _set_up_backend() -> None:
    """Settings of MLX for the whole process."""
    if runs_on_cpu():
        # There mx.compile runs a C++ compiler, a second for each kernel, in the middle of a user's first question;
        # a token is no slower without. Training loops may switch it on again.
        mx.disable_compile()
    # Keeps a large model's weights in memory between tokens (macOS 15 and later).
    elif mx.metal.is_available() and (limit := mx.device_info().get("max_recommended_working_set_size")):
        mx.set_wired_limit(int(limit))


def _read_weights(model: Model, progress: Progress) -> None:
    """Read the lazy weights now, in steps that can be shown and interrupted."""
    arrays = list(named_arrays(model).values())
    total = sum(array.nbytes for array in arrays)
    step: list[mx.array] = []
    done = 0
    for array in arrays:
        step.append(array)
        if sum(a.nbytes for a in step) >= LOAD_STEP_BYTES or array is arrays[-1]:
            mx.eval(step)
            done += sum(a.nbytes for a in step)
            step.clear()
            progress("load", done, total)
