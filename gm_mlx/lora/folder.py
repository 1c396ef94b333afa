"""An adapter's folder: peft's two files, and beside them what it is for and how to use it.

=============================  ==============================================================================
``adapter_model.safetensors``  A and B by peft's names, float32; see ``gm_mlx.lora.peft``
``adapter_config.json``        rank, alpha and all else that peft wants to know, by its keys
``gm.json``                    the base: its name, and its config, which a model must have to get the adapter
``README.md``                  a card
=============================  ==============================================================================

The quantization of the base is not part of what an adapter is for: one that was trained on 4 bits fits the same model
in 16. Nor is the form of the routers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from gm_mlx import __version__
from gm_mlx.config import ModelConfig
from gm_mlx.errors import UserError
from gm_mlx.hub import REPO_ID, fetch
from gm_mlx.lora.attach import DEFAULT_ADAPTER, Wrapped, attach, describe, parts, wrapper_at, wrappers
from gm_mlx.lora.card import adapter_card
from gm_mlx.lora.config import is_embedding, lora_targets
from gm_mlx.lora.layers import LowRank, row_squares
from gm_mlx.lora.merge import with_full_routers
from gm_mlx.lora.pairs import OTHER_BASE, Pair, joined, pairs_by_path
from gm_mlx.lora.peft import LORA_CONFIG, WRAPPER, Factors, lora_alone
from gm_mlx.model import Model
from gm_mlx.new_folder import check_out, new_folder
from gm_mlx.source_names import HF_MODULES, PHI_MODULES, Names, renamed
from gm_mlx.tensors import open_safetensors
from gm_mlx.weights import json_text

ADAPTER_FILE = "adapter_model.safetensors"
MERGE = "merge the adapter instead: gm-mlx convert ADAPTER --base BASE -o OUT"
# What a folder is that has no ADAPTER_FILE, by a file that it has.
FOREIGN = {
    "adapter_model.bin": "has a pickle, adapter_model.bin; save it with peft again, with safe_serialization=True",
    "adapters.safetensors": "is an adapter of mlx-lm, for models of mlx-lm; use it there",
    "model.safetensors": "is a whole model and no adapter; give it as the model",
    "model.safetensors.index.json": "is a whole model and no adapter; give it as the model",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter of which names and shapes are known, and no value is read.

    Attributes:
        folder: where it is.
        config: ``adapter_config.json``.
        factors: its tensors by module.
        gm: ``gm.json``; empty for adapters of other programs.
    """

    folder: Path
    config: dict[str, Any]
    factors: dict[str, Factors]
    gm: dict[str, Any]

    def pairs(self, config: ModelConfig) -> dict[str, Pair]:
        """The factors by path of the model's modules, experts stacked.

        Raises:
            UserError: the adapter is for another model.
        """
        self._check_base(config)
        shapes = {path: target.shape for path, target in lora_targets(config).items()}
        found = pairs_by_path(
            self.factors, self.config, shapes, lambda path: f"the model has no matrix {path}; {OTHER_BASE}"
        )
        return {path: joined(pairs, path, shapes[path]) for path, pairs in found.items()}

    def _check_base(self, config: ModelConfig) -> None:
        if "base" not in self.gm:
            return
        file = self.folder / "gm.json"
        try:
            name, table = self.gm["base"]["name"], self.gm["base"]["config"]
        except (KeyError, TypeError):
            raise UserError(f"{file}: base has no name and config; fetch the adapter again") from None
        try:
            theirs = _flat(_identity(ModelConfig.from_dict(table)))
        except UserError as error:
            raise UserError(f"{file}: base.config: {error}") from None
        for key, ours in _flat(_identity(config)).items():
            if theirs.get(key) != ours:
                raise UserError(
                    f"{file}: the adapter is for {name}, whose {key} is {theirs.get(key)!r} where this model's is "
                    f"{ours!r}; {OTHER_BASE}"
                )


def find_adapter(name: str) -> Path:
    """The folder of an adapter: one that is there, or a Hugging Face repository ``org/name``, which is fetched.

    Raises:
        UserError: there is no such adapter.
    """
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise UserError(f"{name}: an adapter for GGUF files; name the adapter's folder that it was made from")
    if not REPO_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder; name an adapter's folder or a Hugging Face repository (org/name)")
    return fetch(name, (ADAPTER_FILE, LORA_CONFIG, "gm.json"))


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder, written by gm-mlx or by peft, as far as names and shapes go.

    Raises:
        UserError: it is no adapter's, is damaged, or holds more than LoRA.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        what = next((what for name, what in FOREIGN.items() if (folder / name).is_file()), None)
        raise UserError(f"{folder}: {what or f'has no {ADAPTER_FILE}; name the folder of an adapter'}")
    config = _read_json(folder / LORA_CONFIG)
    gm = _read_json(folder / "gm.json") if (folder / "gm.json").is_file() else {}
    return Adapter(folder, config, lora_alone(folder, open_safetensors([file]), config, {}, MERGE), gm)


def load_adapter(
    model: Model, folder: Path, weight: float = 1.0, *, adapter: str | None = None, trainable: bool = False
) -> list[Wrapped]:
    """Put a stored adapter on a model. Several add up.

    Args:
        model: the model that it was trained on, quantized or not.
        folder: the adapter's, as gm-mlx or peft writes it.
        weight: how strong it shall be; 1 is as it was trained.
        adapter: its name in the model; by default the folder's.
        trainable: train it on, and nothing else, with the dropout that it was trained with.

    Returns:
        What was wrapped, in the model's order.

    Raises:
        UserError: it is no adapter, damaged, or for another model.
    """
    if not math.isfinite(weight):
        raise UserError(f"{folder}: a weight of {weight} is not possible; 1 is as it was trained")
    read = read_adapter(Path(folder))
    pairs = read.pairs(model.config)
    targets = lora_targets(model.config)
    lows: dict[str, LowRank] = {}
    for path in targets.keys() & pairs.keys():
        down, up = pairs[path].down.read(), pairs[path].up.read()
        alpha = pairs[path].strength * pairs[path].rank
        dropout = float(read.config.get("lora_dropout") or 0.0) if trainable else 0.0
        lows[path] = LowRank(adapter or Path(folder).name, down, up, alpha, dropout=dropout, weight=weight)
        mx.eval(down, up)
        if is_embedding(path) and pairs[path].magnitude is not None:
            raise UserError(f"{folder}: DoRA of embeddings is not supported; {MERGE}")

    if trainable:
        model.freeze()
    wrapped = []
    for path, target in targets.items():
        if path not in lows:
            continue
        wrapper = wrapper_at(model, path)
        if (magnitude := pairs[path].magnitude) is not None:
            lows[path].use_dora(row_squares(wrapper.base), magnitude.read())
        if not trainable:
            lows[path].freeze()
        wrapped.append(attach(wrapper, target, lows[path]))
    return wrapped


def save_adapter(
    model: Model,
    out: Path,
    *,
    base: str,
    adapter: str = DEFAULT_ADAPTER,
    peft: bool = False,
    force: bool = False,
    gm: Mapping[str, Any] | None = None,
    about: str = "",
) -> None:
    """Write one of a model's adapters as a folder, or nothing (see ``new_folder``).

    Args:
        model: the model.
        out: the folder to be.
        base: what the model is called: a repository, or a folder's name.
        adapter: which adapter.
        peft: give each expert tensors of its own, as peft has them, and not one stack for a layer's.
        force: replace an adapter or a model that is there.
        gm: what ``gm.json`` says beside the base.
        about: what the card says of the training.

    Raises:
        UserError: ``out`` is not free or cannot be written.
        ValueError: the model has no such adapter.
    """
    targets = lora_targets(model.config)
    found = {
        path: low for path, wrapper in wrappers(model).items() for low in wrapper.adapters if low.adapter == adapter
    }
    if not found:
        raise ValueError(f"the model has no adapter {adapter!r}")
    called = HF_MODULES if model.config.text_config.gated else PHI_MODULES
    modules: dict[str, LowRank] = {}
    tensors: dict[str, mx.array] = {}
    for path, low in found.items():
        names = EMBEDDING_NAMES if is_embedding(path) else NAMES
        for module, arrays in _modules(path, low, called, peft).items():
            modules[module] = low
            tensors |= {f"{WRAPPER}{module}.{names[name]}": array for name, array in arrays.items()}
    config = _peft_config(modules, base)
    out = check_out(Path(out), force=force)
    notes = {
        "made_by": f"gm-mlx {__version__}",
        **(gm or {}),
        "base": {"name": base, "config": _identity(model.config)},
    }
    kinds = parts(describe(targets[path], low) for path, low in found.items())
    card = adapter_card(out.name, base, config, kinds, about)
    with new_folder(out, force=force) as folder:
        mx.save_safetensors(str(folder / ADAPTER_FILE), tensors, {"format": "pt"})
        (folder / LORA_CONFIG).write_text(json_text(config), encoding="utf-8")
        (folder / "gm.json").write_text(json_text(notes), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")


# Our arrays, and what peft calls them.
NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_NAMES = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


def _modules(path: str, low: LowRank, called: Names, peft: bool) -> dict[str, dict[str, mx.array]]:
    """What is written of an adapter at one path, by module, with the names that peft would have for it."""
    arrays = {name: low[name] for name in NAMES if name in low}
    module = renamed(path, called) or path
    if not peft or low.lora_a.ndim == 2:
        return {module: arrays}
    before, _, name = module.partition(".switch_mlp.")
    experts = range(low.lora_a.shape[0])
    return {f"{before}.experts.{e}.{name}": {key: array[e] for key, array in arrays.items()} for e in experts}


def _peft_config(modules: Mapping[str, LowRank], base: str) -> dict[str, Any]:
    """``adapter_config.json``: what most modules have as the rule, and all others as exceptions by their full names."""
    ranks = {module: low.rank for module, low in modules.items()}
    alphas = {module: low.alpha for module, low in modules.items()}
    first = next(iter(modules.values()))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout_rate,
        "use_rslora": first.rslora,
        "use_dora": "magnitude" in first,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": list(modules),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _identity(config: ModelConfig) -> dict[str, Any]:
    """What of a base's config an adapter is for: not how it is packed, in what form its routers are, how it trains."""
    config = dataclasses.replace(config, extra={})
    if config.text_config.moe is not None:
        config = with_full_routers(config)
    table = config.to_dict()
    table["text_config"].get("moe", {}).pop("aux_loss_coef", None)
    return json.loads(json.dumps(table))  # tuples as lists, as they come back from a file


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables as one, with keys such as "text_config.hidden_size"."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; an adapter has one, copy it from where the adapter was trained") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the adapter again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; fetch the adapter again")
    return data
