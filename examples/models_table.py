"""Writes the tables of docs/models.md that say what each model is and what runs it, from the code's own tables.

python examples/models_table.py            # into docs/models.md
python examples/models_table.py --print    # to the terminal
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gm_mlx  # noqa: F401  (before anything imports mlx)
from gm_mlx.config import ModelConfig, TextConfig
from gm_mlx.convert.layouts.decoders import DECODERS, Decoder
from gm_mlx.convert.to_gguf.text import find_architecture
from gm_mlx.errors import UserError
from gm_mlx.footprint import footprint
from gm_mlx.presets import PRESETS
from gm_mlx.quant.recipes import recipe_table

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MODELS = {name: config for name, config in PRESETS.items() if name != "gm-tiny"}
NONE = "–"


def preset_table() -> list[tuple[str, ...]]:
    """A row for each preset: its size, as ``gm-mlx info`` counts it, and how much it needs."""
    rows = [("preset", "layers", "experts", "parameters", "active", "tokens per image", "context", "float16", "q4")]
    for name, config in MODELS.items():
        text = config.text_config
        whole, small = (footprint(config, quantization=table) for table in (None, recipe_table(config, "q4")))
        rows.append(
            (
                f"`{name}`",
                str(text.num_hidden_layers),
                _experts(text),
                f"{whole.total / 1e9:.2f} B",
                f"{whole.active / 1e9:.2f} B",
                str(config.num_image_tokens),
                str(text.max_position_embeddings),
                f"{whole.bytes / 1e9:.1f} GB",
                f"{small.bytes / 1e9:.1f} GB",
            )
        )
    return rows


def _experts(text: TextConfig) -> str:
    if text.moe is None:
        return NONE
    what = "language + vision FFN" if text.moe.kind == "evf" else f"{text.moe.num_experts}, top-{text.moe.top_k}"
    return f"{what} in {len(text.sparse_layers)}"


def gguf_table() -> list[tuple[str, ...]]:
    """A row for each preset: the architecture of stock llama.cpp that its decoder is written as."""
    rows = [("preset", "GGUF, dense parent", "GGUF, with its experts")]
    for name, config in MODELS.items():
        dense = replace(config, text_config=replace(config.text_config, moe=None))
        sparse = _architecture(config) if config.text_config.moe else NONE
        rows.append((f"`{name}`", _architecture(dense), sparse))
    return rows


def _architecture(config: ModelConfig) -> str:
    try:
        return f"`{find_architecture(config.text_config).name}`"
    except UserError:
        return "no"


def decoder_table() -> list[tuple[str, ...]]:
    """A row for each family of decoders that ``convert`` reads: what it is made of, and what its config is called."""
    rows = [("decoder", "`model_type`", "norm", "attention biases", "positions", "FFN", "block", "head")]
    for decoder in DECODERS:
        fixed = decoder.fixed
        rows.append(
            (
                decoder.title,
                ", ".join(f"`{kind}`" for kind in decoder.model_type.split("|") if kind),
                "LayerNorm" if fixed.get("norm") == "layer" else "RMSNorm",
                _biases(decoder, fixed),
                "part of a head" if "partial_rotary_factor" in decoder.keys else "whole head",
                f"{'gated' if fixed.get('gated', True) else 'plain, with biases'}, {decoder.activation}",
                "parallel" if fixed.get("parallel_block") else "sequential",
                "tied" if decoder.tied else "own",
            )
        )
    return rows


def _biases(decoder: Decoder, fixed: Mapping[str, Any]) -> str:
    if decoder.bias is None:
        return str(fixed["attention_bias"])
    key, biased, which = decoder.bias
    return f"{which} with `{key}`" + (", the default" if biased else "")


TABLES = {"presets": preset_table, "gguf": gguf_table, "decoders": decoder_table}


def written(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in TABLES.items():
        head, *rows = [f"| {' | '.join(row)} |" for row in table()]
        lines = "\n".join([head, "|" + "---|" * (head.count(" | ") + 1), *rows])
        page, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, new=lines: f"{m[1]}{new}\n{m[2]}", page, flags=re.DOTALL
        )
        if not found:
            raise SystemExit(f"{PAGE}: has no <!-- {name} -->")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tables of docs/models.md.")
    parser.add_argument("--print", action="store_true", dest="show", help="print the page and leave the file alone")
    page = written(PAGE.read_text(encoding="utf-8"))
    if parser.parse_args().show:
        print(page)
    else:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
