"""Tiny GGUF files: ours, converted from a tiny random model, and others as anybody's tools would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from fixtures import tiny_folder, tiny_model
from gguf import GGUFWriter
from tiny_tokenizer import sentencepiece_model

from gm_mlx.chat_template import GEMMA, ChatTemplate
from gm_mlx.convert.to_gguf.folder import gguf_pair, write_gguf_folder
from gm_mlx.convert.to_gguf.types import find_target
from gm_mlx.folder import read_model_folder
from gm_mlx.model import Model
from gm_mlx.processor import Processor

WIDTH, FFN, LAYERS, HEADS = 64, 96, 2, 2
SIDE, PATCH = 16, 8
SENTENCEPIECE_TYPES = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
CHATML = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def our_folder(
    folder: Path,
    *,
    model: Model | None = None,
    template: ChatTemplate = GEMMA,
    file_type: str = "F32",
    layout: Literal["cls_first", "cls_last"] = "cls_first",
) -> tuple[Path, Path]:
    """A tiny model for both engines; returns its model folder and the folder with its GGUF files."""
    model = model or tiny_model()
    source = tiny_folder(folder / "mlx", model=model, template=template)
    processor = Processor.from_folder(source)
    pair = gguf_pair(model.config, read_model_folder(source), processor, name="tiny", layout=layout)
    write_gguf_folder(folder / "gguf", pair, gm={}, card="", target=find_target(file_type, {}))
    return source, folder / "gguf"


def write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write a GGUF file with gguf-py and return it; values are bool, int (uint32), float, str or lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, arch)
    add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        add[type(value)](key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(prefix_space: bool = False) -> dict[str, Any]:
    """Keys of the tiny SentencePiece tokenizer."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(prefix_space))
    size = model.get_piece_size()
    kinds = [next((k for name, k in SENTENCEPIECE_TYPES.items() if getattr(model, name)(i)), 1) for i in range(size)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.eot_token_id": model.piece_to_id("<end_of_turn>"),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix_space,
    }


def text_keys(template: str | None = CHATML, prefix_space: bool = False) -> dict[str, Any]:
    """Metadata of ``write_text``."""
    return {
        "llama.context_length": 512,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        **vocabulary(prefix_space),
        **({} if template is None else {"tokenizer.chat_template": template}),
    }


def text_tensors(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a dense model of llama.cpp's architecture ``llama``."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) * 2 * shape[-1] ** -0.5).astype(np.float32)

    tensors = {"token_embd.weight": draw(rows, WIDTH), "output.weight": draw(rows, WIDTH)}
    tensors["output_norm.weight"] = np.ones(WIDTH, np.float32)
    for i in range(LAYERS):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // HEADS, WIDTH),
            "attn_v": (WIDTH // HEADS, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FFN, WIDTH),
            "ffn_up": (FFN, WIDTH),
            "ffn_down": (WIDTH, FFN),
        }
        tensors |= {f"blk.{i}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{i}.{name}.weight": np.ones(WIDTH, np.float32) for name in ("attn_norm", "ffn_norm")}
    return tensors


def write_text(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random text model of the architecture ``llama``; ``changes`` are passed to ``text_keys``."""
    keys = text_keys(**changes)
    return write(path, "llama", keys, text_tensors(len(keys["tokenizer.ggml.tokens"]), seed))


def vision_keys(width: int = WIDTH) -> dict[str, Any]:
    """Metadata of ``write_mmproj``."""
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": SIDE,
        "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.block_count": 2,
        "clip.vision.projection_dim": width,
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }


def vision_tensors(width: int = WIDTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a tower without a class token and an MLP projector."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) * 0.3).astype(np.float32)

    tensors = {"v.patch_embd.weight": draw(32, 3, PATCH, PATCH), "v.patch_embd.bias": draw(32)}
    tensors["v.position_embd.weight"] = draw((SIDE // PATCH) ** 2, 32)
    layer = {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (32, 32)), "ffn_up": (48, 32)}
    layer |= {"ffn_down": (32, 48), "ln1": (32,), "ln2": (32,)}
    # LLaVA reads the last layer but one: of these two, the second does not matter.
    shapes = {f"v.blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    for name, shape in {**shapes, "mm.0": (width, 32), "mm.2": (width, width)}.items():
        tensors |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    return tensors


def write_mmproj(path: Path, *, width: int = WIDTH, seed: int = 0) -> Path:
    """A random vision model for a text model of some width."""
    return write(path, "clip", vision_keys(width), vision_tensors(width, seed))
