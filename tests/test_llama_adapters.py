"""LoRA adapters in the engine on llama.cpp, and files that must not take the process with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_llama
from fixtures import tiny_config, tiny_model
from lora_adapters import IDS, draw
from tiny_gguf import our_folder, write

from gm_mlx.cli.console import with_strength
from gm_mlx.convert.to_gguf.lora import convert_adapter
from gm_mlx.errors import UserError
from gm_mlx.llama.engine import LlamaCppEngine
from gm_mlx.vlm import open_engine
from gm_mlx.weights import named_arrays


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's GGUF file and an adapter's."""
    folder = tmp_path_factory.mktemp("lora")
    model = tiny_model()
    weights = {name: np.array(array) for name, array in named_arrays(model).items()}
    _, made = our_folder(folder, model=model)
    adapter = draw(model.config, weights, ".*").write(folder / "adapter")
    convert_adapter(adapter, made, folder / "lora.gguf")
    return made / "model.gguf", folder / "lora.gguf"


def test_adapters_are_at_work(files: tuple[Path, Path]) -> None:
    """In a new context too: the second prompt does not fit the first one."""
    model, adapter = files
    ids = [*IDS, *IDS]
    for loras in ([], [(adapter, 1.0)], [(adapter, 0.5), (adapter, 0.25)]):
        engine = LlamaCppEngine(model, threads=2, lora=loras)
        engine._context.close()  # type: ignore[union-attr]
        engine._context = None
        engine._grow(len(IDS))
        try:
            for prompt in (IDS, ids):
                given = engine.all_logits(prompt)
                wanted = raw_llama.logits(
                    model, [prompt], [(adapter, sum(scale for _, scale in loras))] if loras else []
                )
                assert np.abs(given - wanted).max() <= 2e-3 * np.abs(wanted).max()
        finally:
            engine.close()


def test_options(files: tuple[Path, Path]) -> None:
    assert [with_strength(text) for text in ("a.gguf", "a.gguf=0.5", "a=b.gguf", "a=b.gguf=2", "=1")] == [
        ("a.gguf", 1.0), ("a.gguf", 0.5), ("a=b.gguf", 1.0), ("a=b.gguf", 2.0), ("=1", 1.0)
    ]  # fmt: skip
    with pytest.raises(UserError, match="--lora is for GGUF files"):
        open_engine(None, lora=[("x.gguf", 1.0)])
    with pytest.raises(UserError, match="strength of nan"):
        LlamaCppEngine(files[0], lora=[(files[1], float("nan"))])
    with pytest.raises(UserError, match=r"no\.gguf"):
        LlamaCppEngine(files[0], lora=[("no.gguf", 1.0)])


KEYS = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}


def pair(name: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {f"{name}.lora_{part}": np.ones(shape, np.float32) for part, shape in (("a", down), ("b", up))}


Q = pair("blk.1.attn_q.weight", (2, 64), (64, 2))
BAD: list[tuple[str, dict[str, Any], dict[str, np.ndarray], str]] = [
    ("gemma4", {"general.type": "model"}, Q, "no LoRA adapter; make one with"),
    ("gemma4", {"general.type": 1}, Q, "no LoRA adapter"),
    ("gemma4", {"adapter.type": "other"}, Q, "no LoRA adapter"),
    ("gemma4", {"adapter.lora.alpha": 4}, Q, "adapter.lora.alpha is uint32 and not float32"),
    ("gemma4", {"adapter.alora.invocation_tokens": [1]}, Q, "behind certain tokens only"),
    ("gemma", {}, Q, "is for a model of type 'gemma', and .* is 'gemma4'"),
    ("gemma4", {}, dict([next(iter(Q.items()))]), "lacks its other factor"),
    ("gemma4", {}, pair("blk.9.attn_q.weight", (2, 64), (64, 2)), "does not fit"),
    ("gemma4", {}, pair("blk.1.attn_q.weight", (2, 64), (64, 3)), "does not fit"),
    ("gemma4", {}, pair("blk.1.attn_norm.weight", (2, 64), (64, 2)), "does not fit"),
    ("gemma4", {}, pair("blk.1.ffn_up_exps.weight", (2, 64), (128, 2)), "does not fit"),
    ("gemma4", {}, pair("blk.1.ffn_up_exps.weight", (1, 2, 64), (1, 128, 2)), "does not fit"),
    ("gemma4", {}, pair("token_embd.weight", (2, 64), (512, 2)), "does not fit"),
    ("gemma4", {}, Q | {"blk.1.attn_q.bias": np.ones(64, np.float32)}, "llama.cpp cannot load it"),
]


@pytest.mark.parametrize(("arch", "keys", "tensors", "message"), BAD)
def test_bad_files(
    arch: str,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    message: str,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    bad = write(tmp_path / "bad.gguf", arch, KEYS | keys, tensors)
    with pytest.raises(UserError, match=message):
        LlamaCppEngine(files[0], lora=[(bad, 1.0)])


def test_an_embedding_that_is_the_head(tmp_path: Path) -> None:
    """llama.cpp would stop the process at an assertion."""
    _, folder = our_folder(tmp_path, model=tiny_model(config=tiny_config(tie_word_embeddings=True)))
    bad = write(tmp_path / "bad.gguf", "gemma4", KEYS, pair("token_embd.weight", (512, 2), (64, 2)))
    with pytest.raises(UserError, match="does not fit"):
        LlamaCppEngine(folder / "model.gguf", lora=[(bad, 1.0)])
