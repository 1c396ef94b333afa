"""The engine on llama.cpp: GGUF files, on any machine that llama.cpp runs on.

It does what ``gm_mlx.mlx_engine`` does, with the same memory between two calls: a key/value cache with the keys of the
rows in it, and features of the last few images. Keys are noted after their rows were computed. So the cache may hold
more than the keys tell, when an answer is broken off, but never less; and the next call cuts it back to what both
conversations have in common.

The cache's size is the one asked for, or else it begins at ``FIRST_CONTEXT`` positions and doubles when a conversation
needs more, up to what the model was made for. Models for 128 thousand positions would otherwise take gigabytes at once.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from gm_mlx.engine import GREEDY, Piece, Progress, Sampling, Stats
from gm_mlx.errors import UserError
from gm_mlx.images import square
from gm_mlx.llama.adapters import Adapters
from gm_mlx.llama.binding import LOG, library
from gm_mlx.llama.check import check_mmproj, check_pair, check_text_model
from gm_mlx.llama.context import Context
from gm_mlx.llama.model import LlamaModel, physical_cores
from gm_mlx.llama.options import check_options
from gm_mlx.llama.probe import layout_notice
from gm_mlx.llama.prompt import PROCESSOR, ForeignPrompts, OurPrompts, Prompt
from gm_mlx.llama.repack import should_repack
from gm_mlx.llama.sampling import Sampler
from gm_mlx.llama.trial import check_by_trial
from gm_mlx.llama.vision import Picture, Vision
from gm_mlx.llama.vocab import Vocabulary
from gm_mlx.llama.worker import Worker
from gm_mlx.notice import ImageNotice
from gm_mlx.prefix import Key, reusable

if TYPE_CHECKING:
    from PIL.Image import Image

    from gm_mlx.chat_template import Message
    from gm_mlx.images import ImageSource

FIRST_CONTEXT = 4096
WHOLE_IMAGE = 2048  # a model whose image tokens see each other gets them in one piece; no such image has more


class LlamaCppEngine:
    """``gm_mlx.engine.Engine`` on llama.cpp.

    Args:
        path: a GGUF file of a text model, or the first part of one that is split.
        mmproj: the GGUF file of its vision model; None for a model that reads text only.
        model_name: what the user calls the model; the file's path by default.
        n_ctx: positions of the key/value cache; by default it grows with the conversation.
        threads: processors to use; by default all real cores.
        gpu_layers: layers that a GPU computes; by default all, where there is one.
        kv_bits: 8 or 4 for a quantized key/value cache.
        max_kv_size: refused: llama.cpp's cache forgets nothing.
        prefill_chunk: prompt positions that are computed at a time.
        lora: files of LoRA adapters, and how strong each shall be; 1 is as it was trained.
        repack: rearrange weights for the CPU; by default as ``gm_mlx.llama.repack`` finds better.
        show_log: print what llama.cpp says, to stderr.
        progress: told about loading, encoding and prefilling; see ``Progress``.

    Raises:
        UserError: a file is damaged, does not fit the other one or is refused by llama.cpp, an option is out of range,
            or llama-cpp-python is not installed.
    """

    name = "llama.cpp"

    def __init__(
        self,
        path: str | Path,
        mmproj: str | Path | None = None,
        *,
        model_name: str | None = None,
        n_ctx: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
        kv_bits: int | None = None,
        max_kv_size: int | None = None,
        prefill_chunk: int = 512,
        lora: Sequence[tuple[str | Path, float]] = (),
        repack: bool | None = None,
        show_log: bool = False,
        progress: Progress | None = None,
    ) -> None:
        check_options(n_ctx, threads, gpu_layers, kv_bits, max_kv_size, prefill_chunk)
        header = check_text_model(path)
        vision_header = check_mmproj(mmproj) if mmproj is not None else None
        if vision_header is not None:
            check_pair(header, vision_header)
        LOG.shown = LOG.shown or show_log
        library()
        check_by_trial(header, vision_header)
        self.model = model_name or str(path)
        self._path = Path(path)
        self._progress = progress or (lambda phase, done, total: None)
        self._worker = Worker()
        self._threads = threads or physical_cores()
        ours = PROCESSOR in header.metadata
        self._model = LlamaModel(
            header,
            vision_header,
            worker=self._worker,
            gpu_layers=gpu_layers,
            threads=self._threads,
            keep_spaces=ours,
            as_stored=not (should_repack(header) if repack is None else repack),
            progress=progress,
        )
        self._context: Context | None = None
        self._vision: Vision | None = None
        self._keys: list[Key] = []
        try:
            self._adapters = Adapters(self._model, header, self._worker, lora)
            vocabulary = Vocabulary(header, self._model.vocab)
            self.prompts = OurPrompts(header, vocabulary) if ours else ForeignPrompts(header, vocabulary)
            self.image_config = self.prompts.processor.image if isinstance(self.prompts, OurPrompts) else None
            self._vision = self._make_vision() if self._model.mtmd is not None else None
            self.context_length = n_ctx or self._model.context_length
            if self.context_length > self._model.context_length:
                most = self._model.context_length
                raise UserError(f"n_ctx: {n_ctx} is more than the model was made for; ask for at most {most}")
            self._banned = [
                *self.prompts.banned(),
                *range(vocabulary.size, len(header.metadata["tokenizer.ggml.tokens"])),
            ]
            self._rows = len(header.metadata["tokenizer.ggml.tokens"])
            self._kv_bits, self._chunk = kv_bits, prefill_chunk
            self._grow(min(self.context_length, n_ctx or FIRST_CONTEXT))
            self._image_notice = ImageNotice.from_folder(self._path.parent) if ours else ImageNotice()
            notices = [self.prompts.notice, layout_notice(vision_header, self.model) if vision_header else None]
            self._pending_notices = [notice for notice in notices if notice]
        except BaseException:
            self.close()
            raise

    def stream(
        self, messages: Sequence[Message], images: Sequence[Image] = (), sampling: Sampling = GREEDY
    ) -> Iterator[Piece]:
        """See ``Engine.stream``. The arguments are checked at once, and nothing is computed before the first piece."""
        return self._answer(self._tokenize(messages, images), images, sampling)

    def prompt_logits(self, messages: Sequence[Message], images: Sequence[Image] = ()) -> np.ndarray:
        """Logits float32 [V] of the first token of an answer; arguments and errors as for ``stream``."""
        self._turn = object()  # an answer that is under way cannot go on
        prompt = self._tokenize(messages, images)
        self._grow(len(prompt.keys) + 1)
        self._prefill(prompt, images, Stats())
        return self._open().logits()

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits float32 [L, V] after each of L >= 1 token ids, which are the whole input."""
        if len(ids) > self.context_length:
            raise UserError(f"{len(ids)} tokens do not fit the model's context of {self.context_length}; give fewer")
        self._turn = object()
        self._grow(len(ids))
        context = self._open()
        self._keys = []
        context.cut(0)
        out = []
        for start in range(0, len(ids), context.chunk):
            part = ids[start : start + context.chunk]
            context.decode(part, start, all_logits=True)
            out += [context.logits(row) for row in range(len(part))]
        return np.stack(out)

    def answer_ids(
        self, ids: Sequence[int], images: Sequence[Image], max_tokens: int, vocab_size: int, stop_ids: Collection[int]
    ) -> tuple[np.ndarray, list[int]]:
        """What follows token ids, for comparisons; of files that gm-mlx wrote.

        Args:
            ids: the prompt, with each image slot as a run of the image token's id.
            images: one per slot, of the size that the tower reads.
            max_tokens: most tokens of the answer.
            vocab_size: ids from here on are never chosen.
            stop_ids: ids that end the answer, and are not part of it.

        Returns:
            Logits float32 [V] after the prompt, and the ids of the greedy answer.
        """
        assert isinstance(self.prompts, OurPrompts)
        self._turn = object()
        prompt = self.prompts.from_ids(ids, images, self._see(images))
        self._grow(len(prompt.keys) + max_tokens)
        self._prefill(prompt, images, Stats())
        context, position, answer = self._open(), self._position, list[int]()
        first = logits = context.logits()
        while len(answer) < max_tokens:
            allowed = logits[:vocab_size].copy()
            allowed[[token for token in self._banned if token < vocab_size]] = -np.inf
            token = int(allowed.argmax())
            if token in stop_ids:
                break
            answer.append(token)
            if len(answer) < max_tokens:
                context.decode([token], position)
                self._keys.append(token)
                position += 1
                logits = context.logits()
        return first, answer

    def encode_image(self, image: Image) -> np.ndarray:
        """Features float32 [T, D] of an image, as the text model reads them."""
        vision = self._see([image])
        assert vision is not None
        return np.concatenate(vision.encode(image)[0])

    def open_image(self, source: ImageSource) -> Image:
        """See ``Engine.open_image``."""
        return self.prompts.open_image(source)

    def notices(self, images: Sequence[Image] = ()) -> list[str]:
        """See ``Engine.notices``."""
        lines, self._pending_notices = self._pending_notices, []
        return lines + self._image_notice.lines(images)

    def reset(self) -> None:
        """Forget the last conversation; image features are kept."""
        self._keys = []
        if self._context is not None:
            self._context.clear()

    def close(self) -> None:
        """See ``Engine.close``."""
        self._turn = object()
        if self._context is not None:
            self._context.close()
        self._context = None
        self._vision = None
        self._model.close()

    def _make_vision(self) -> Vision:
        if not isinstance(self.prompts, OurPrompts):
            return Vision(self._model, self._worker)
        config = self.image_config
        if config is None:
            raise UserError(f"{self._path}: the model reads text only; leave the mmproj file out")
        return Vision(self._model, self._worker, lambda image: square(image, config))

    def _see(self, images: Sequence[Image]) -> Vision | None:
        """The vision model, which must be there when there are images."""
        if images and self._vision is None:
            raise UserError(
                f"{self.model}: was loaded without a vision model, so it reads no images; name its mmproj file with "
                "--mmproj, or leave the image out"
            )
        return self._vision

    def _open(self) -> Context:
        if self._context is None:
            raise RuntimeError("this engine was closed")
        return self._context

    def _tokenize(self, messages: Sequence[Message], images: Sequence[Image]) -> Prompt:
        """A conversation that fits the context."""
        prompt = self.prompts.build(messages, images, self._see(images))
        if len(prompt.keys) >= self.context_length:
            raise UserError(
                f"the prompt has {len(prompt.keys)} tokens but the model's context is {self.context_length}; shorten "
                "it, use fewer images or start a new conversation"
            )
        if not prompt.parts or isinstance(prompt.parts[-1], Picture):
            raise UserError("the prompt has no text at its end, so there is nothing to answer; ask something")
        return prompt

    def _answer(self, prompt: Prompt, images: Sequence[Image], sampling: Sampling) -> Iterator[Piece]:
        turn = self._turn = object()
        stats = Stats(prompt_tokens=len(prompt.keys), image_tokens=prompt.image_rows)
        most = min(sampling.max_tokens, self.context_length - len(prompt.keys))
        try:
            self._grow(len(prompt.keys) + most)
            self._prefill(prompt, images, stats)
            for piece in self._decode(prompt, sampling, most, stats):
                yield piece
                if self._turn is not turn:
                    raise RuntimeError("another answer was begun on this engine before this one had ended")
        except Exception:
            if self._turn is turn:
                self.reset()
            raise

    def _grow(self, needed: int) -> None:
        """Make sure that the cache has room; what it holds is lost when it has not."""
        if self._context is not None and self._context.size >= needed:
            return
        size = self._context.size if self._context is not None else needed
        while size < needed:
            size *= 2
        if self._context is not None:
            self._context.close()
        self._context, self._keys = None, []
        mtmd = self._model.mtmd
        whole = mtmd is not None and library().mtmd_decode_use_non_causal(mtmd, None)
        self._context = Context(
            self._model,
            self._worker,
            size=min(size, self.context_length),
            chunk=max(self._chunk, WHOLE_IMAGE) if whole else self._chunk,
            threads=self._threads,
            kv_bits=self._kv_bits,
        )
        self._adapters.put_on(self._context)

    def _prefill(self, prompt: Prompt, images: Sequence[Image], stats: Stats) -> None:
        """Compute what the cache does not hold of a prompt, up to its last logits."""
        context = self._open()
        stats.cached_tokens = start = self._reuse(prompt)
        features = self._encode(prompt, start, images, stats)
        began = perf_counter()
        total, row, position = len(prompt.keys) - start, 0, 0
        context.interruptible(True)
        try:
            for part in prompt.parts:
                if isinstance(part, Picture):
                    if row >= start:
                        context.decode_image(part.chunk, features[part.image][part.number], position)
                        self._keys += prompt.keys[row : row + part.rows]
                        self._progress("prefill", len(self._keys) - start, total)
                    row, position = row + part.rows, position + part.positions
                    continue
                for offset in range(max(0, start - row), len(part), context.chunk):
                    ids = part[offset : offset + context.chunk]
                    context.decode(ids, position + offset)
                    self._keys += ids
                    self._progress("prefill", len(self._keys) - start, total)
                row, position = row + len(part), position + len(part)
        finally:
            context.interruptible(False)
        self._position = position
        stats.prefill_seconds = perf_counter() - began

    def _reuse(self, prompt: Prompt) -> int:
        """Cut the cache back to what it has in common with a prompt; returns the rows of that."""
        start = reusable(self._keys, prompt.keys)
        self._keys = prompt.keys[:start]
        if not self._open().cut(prompt.position(start)):
            self._keys, start = [], 0
        return start

    def _encode(self, prompt: Prompt, start: int, images: Sequence[Image], stats: Stats) -> dict[int, list[np.ndarray]]:
        """Features of the images behind a row."""
        began, row = perf_counter(), 0
        features: dict[int, list[np.ndarray]] = {}
        for part in prompt.parts:
            if isinstance(part, Picture) and row >= start and part.image not in features:
                assert self._vision is not None
                features[part.image], fresh = self._vision.encode(images[part.image], prompt.hashes[part.image])
                if fresh:
                    stats.images_encoded += 1
                    self._progress("encode", stats.images_encoded, stats.images_encoded)
            row += part.rows if isinstance(part, Picture) else len(part)
        stats.encode_seconds = perf_counter() - began
        return features

    def _decode(self, prompt: Prompt, sampling: Sampling, most: int, stats: Stats) -> Iterator[Piece]:
        context, answer = self._open(), self.prompts.answer()
        sampler = Sampler(sampling, self._rows, self._banned, prompt.ids)
        text, position = "", self._position
        try:
            began = perf_counter()
            for count in range(1, most + 1):
                token = sampler.choose(context)
                stats.decode_seconds += perf_counter() - began
                stats.generated_tokens = count
                text, stopped = answer.add(token)
                if stopped:
                    stats.finish_reason = "stop"
                    break
                if text:
                    yield Piece(text, stats)
                began = perf_counter()
                if count < most:
                    context.decode([token], position)
                    self._keys.append(token)
                    position += 1
            else:
                stats.finish_reason = "length"
                text = answer.finish()
        finally:
            sampler.close()
        stats.peak_memory_bytes = _peak_memory()
        yield Piece(text, stats)


def _peak_memory() -> int:
    """The most memory that this process ever had, weights that are mapped from files included; bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
