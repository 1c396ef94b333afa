"""Where the installed llama.cpp wants the position embedding of a CLIP tower's class token: found out, not looked up.

A CLIP tower reads a class token and the patches of an image, in this order. llama.cpp's vision library puts the class
token behind the patches since 2025, while positions and the choice of rows take it for the first (ggml-org/llama.cpp,
issue 25814). So every patch gets its neighbour's position, and features come out wrong. A file with rolled position
embeddings, the class token's last, makes up for that: the features of all patches are right then, but the first one is
left out, and the class token's features stand behind the last. The day llama.cpp is mended, the standard order is right
again. No version number tells, since people build it from all kinds of sources.

So the probe writes a tower of a few thousand weights in both layouts, lets the installed library read an image, and
compares with the same tower in NumPy. It takes part of a second and is done once for each build of the library.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import GGUFHeader, read_header
from gm_mlx.llama.binding import library_file
from gm_mlx.llama.memo import remembered
from gm_mlx.llama.model import LlamaModel
from gm_mlx.llama.vision import Vision
from gm_mlx.llama.worker import Worker

Layout = Literal["cls_first", "cls_last"]
LAYOUTS: tuple[Layout, ...] = ("cls_first", "cls_last")
LAYOUT_KEY = "gm.position_layout"

WIDTH, FFN, HEADS, PATCH, GRID, EPS = 32, 64, 2, 4, 3, 1e-5
PATCHES = GRID * GRID
SIDE = GRID * PATCH
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
CLOSE = 0.05  # relative error of float16 arithmetic, with room; the wrong layout has about 1

OTHER_LAYOUT = (
    "{model}: image features come out wrong on the installed llama.cpp, which needs the class token's position {need};"
    " write the file again with `gm-mlx convert ... --to gguf --clip-layout {layout}`, or use another llama.cpp"
)
PLACES = {"cls_first": "first", "cls_last": "last"}


@cache
def needed_layout() -> Layout:
    """The layout that the installed llama.cpp computes right.

    Raises:
        UserError: llama-cpp-python is not installed, or neither layout is computed right.
    """
    found = remembered("clip-layout", [library_file()], _probe)
    return next((layout for layout in LAYOUTS if layout == found), LAYOUTS[0])


def layout_notice(mmproj: GGUFHeader, model: str) -> str | None:
    """What a user should know about a vision file and the installed llama.cpp, or None; for files of gm-mlx only."""
    layout = mmproj.metadata.get(LAYOUT_KEY, "none")
    if layout not in LAYOUTS or (need := needed_layout()) == layout:
        return None
    return OTHER_LAYOUT.format(model=model, need=PLACES[need], layout=need)


def _probe() -> str:
    weights = _weights()
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    wanted = _reference(weights, pixels)
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="gm-mlx-") as folder:
        text = Path(folder, "model.gguf")
        _write_text(text)
        for layout in LAYOUTS:
            file = Path(folder, f"{layout}.gguf")
            _write_vision(file, weights, layout)
            features = _features(text, file, Image.fromarray(pixels))
            error = features - wanted if layout == "cls_first" else features[:-1] - wanted[1:]
            errors[layout] = float(np.linalg.norm(error) / np.linalg.norm(wanted))
    best = min(errors, key=lambda layout: errors[layout])
    if not errors[best] < CLOSE:
        raise UserError(
            "the installed llama.cpp computes CLIP towers in a way that is not known here; update gm-mlx, or choose a "
            "layout with --clip-layout"
        )
    return best


def _features(text: Path, mmproj: Path, image: Image.Image) -> np.ndarray:
    worker = Worker()
    model = LlamaModel(read_header(text), read_header(mmproj), worker=worker, gpu_layers=0)
    try:
        return np.concatenate(Vision(model, worker).encode(image)[0])
    finally:
        model.close()


def _weights() -> dict[str, np.ndarray]:
    """Random weights of a tower of one layer and its projector, large enough that each matters."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (random.normal(size=shape) * (1 if len(shape) < 2 else shape[-1] ** -0.5)).astype(np.float32)

    weights = {
        "v.class_embd": draw(WIDTH),
        "v.patch_embd.weight": (random.normal(size=(WIDTH, 3, PATCH, PATCH)) * 0.3).astype(np.float32),
        "v.position_embd.weight": random.normal(size=(1 + PATCHES, WIDTH)).astype(np.float32),
        "v.pre_ln.weight": 1 + 0.1 * draw(WIDTH),
        "v.pre_ln.bias": 0.1 * draw(WIDTH),
    }
    for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (WIDTH, WIDTH)),
                        "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}.items():  # fmt: skip
        weights[f"v.blk.0.{name}.weight"] = 2 * draw(*shape)
        weights[f"v.blk.0.{name}.bias"] = 0.1 * draw(shape[0])
    for name in ("ln1", "ln2"):
        weights[f"v.blk.0.{name}.weight"], weights[f"v.blk.0.{name}.bias"] = 1 + 0.1 * draw(WIDTH), 0.1 * draw(WIDTH)
    for name in ("mm.0", "mm.2"):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = draw(WIDTH, WIDTH), 0.1 * draw(WIDTH)
    return weights


def _reference(weights: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Features float64 [N, D] as the CLIP and LLaVA papers have them."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)  # [H, N, D/H]

    patches = (pixels / 255.0).reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(PATCHES, -1)
    x = np.concatenate([w["v.class_embd"][None], patches @ w["v.patch_embd.weight"].reshape(WIDTH, -1).T])
    x = norm(x + w["v.position_embd.weight"], "v.pre_ln")  # [1 + N, D]
    y = norm(x, "v.blk.0.ln1")
    q, k, v = (heads(linear(y, f"v.blk.0.attn_{name}")) for name in "qkv")
    scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH / HEADS))
    mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), WIDTH)
    x = x + linear(mixed, "v.blk.0.attn_out")
    y = linear(norm(x, "v.blk.0.ln2"), "v.blk.0.ffn_up")
    x = x + linear(y / (1 + np.exp(-1.702 * y)), "v.blk.0.ffn_down")  # CLIP's quick GELU
    y = linear(x[1:], "mm.0")
    y = y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return linear(y, "mm.2")


def _write_vision(path: Path, weights: dict[str, np.ndarray], layout: Layout) -> None:
    tensors = dict(weights)
    if layout == "cls_last":
        tensors["v.position_embd.weight"] = np.roll(tensors["v.position_embd.weight"], -1, axis=0)
    # LLaVA reads the last layer but one, so there is another behind it, which does not matter.
    tensors |= {name.replace("blk.0", "blk.1"): value for name, value in weights.items() if "blk.0" in name}
    keys = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": SIDE,
        "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": WIDTH,
        "clip.vision.feed_forward_length": FFN,
        "clip.vision.block_count": 2,
        "clip.vision.projection_dim": WIDTH,
        "clip.vision.attention.head_count": HEADS,
        "clip.vision.attention.layer_norm_epsilon": EPS,
        "clip.vision.image_mean": [0.0, 0.0, 0.0],
        "clip.vision.image_std": [1.0, 1.0, 1.0],
    }
    _write(path, "clip", keys, tensors)


def _write_text(path: Path) -> None:
    """The smallest model that the vision library accepts beside a tower."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    keys = {
        "llama.context_length": 64,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": EPS,
        "llama.rope.dimension_count": WIDTH,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * len(BYTE_TOKENS)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors: dict[str, np.ndarray] = {f"blk.0.{name}.weight": np.zeros((WIDTH, WIDTH), np.float32) for name in matrices}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors |= {f"{name}.weight": np.ones(WIDTH, np.float32) for name in norms}
    _write(path, "llama", keys, {"token_embd.weight": np.zeros((len(tokens), WIDTH), np.float32), **tensors})


def _write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    from gguf import GGUFWriter

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
