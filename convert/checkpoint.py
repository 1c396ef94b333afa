"""A folder with a PyTorch checkpoint: which of its files count, and the tensors in them, not yet read.

Trainers leave more in a folder than the model: full weights twice, the projector of an earlier stage, an adapter. The
rules here say which files are used, and keep apart what plays different roles:

==================  ==============================================================================================
full weights        ``model*.safetensors`` or ``pytorch_model*.bin``, one file or shards with an index
``projector``       ``mm_projector.bin``, the whole of stage 1; beside full weights it is an older one, and ignored
``adapter``         ``adapter_model.safetensors`` or ``.bin``: LoRA factors, with ``adapter_config.json``
``non_lora``        ``non_lora_trainables.bin``: what LLaVA trains beside LoRA, mostly the projector
==================  ==============================================================================================
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gm_mlx.convert.torch_pickle import open_torch
from gm_mlx.errors import UserError
from gm_mlx.lora.peft import LORA_CONFIG
from gm_mlx.tensors import Tensor, open_safetensors


@dataclass
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: the folder.
        config: its ``config.json``; empty for an adapter without one.
        tensors: the full weights by their own names; empty in stage-1 and LoRA folders.
        files: the tensor files that are used, of all roles.
        projector: the tensors of ``mm_projector.bin``, where there are no full weights.
        adapter: LoRA factors and what else the adapter replaces.
        adapter_config: ``adapter_config.json``; for LoRA factors inside the full weights, what ``config.json`` says of
            them under ``lora``, in the words of ``adapter_config.json``.
        non_lora: the tensors of ``non_lora_trainables.bin``.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: list[Path]
    projector: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    adapter_config: dict[str, Any] = field(default_factory=dict)
    non_lora: dict[str, Tensor] = field(default_factory=dict)


class Format(NamedTuple):
    """How a format's full weights are named, and what opens them."""

    single: str
    index_file: str
    shard: re.Pattern[str]
    open: Callable[[Iterable[Path]], dict[str, Tensor]]


# The first that a folder has is used: safetensors are data by construction.
FORMATS = (
    Format(
        "model.safetensors",
        "model.safetensors.index.json",
        re.compile(r"model-(\d{5,})-of-(\d{5,})\.safetensors"),
        open_safetensors,
    ),
    Format(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        re.compile(r"pytorch_model-(\d{5,})-of-(\d{5,})\.bin"),
        open_torch,
    ),
)
ADAPTERS = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_torch}
ROLES = {"projector": "mm_projector.bin", "non_lora": "non_lora_trainables.bin"}

# Tensors that one file of a model may have and another leave out: buffers, and a head that is the embedding.
OPTIONAL = re.compile(r"(.*\.)?(inv_freq|position_ids|masked_bias|attn\.bias|lm_head\.weight|lm_head\.bias)")

# Files that say what a folder is when it has no weights that we read: what they are, and what to do.
FOREIGN = {
    r".*\.gguf": "GGUF files, which cannot be converted back; name the checkpoint that they were made from",
    r"(zero_pp_rank|bf16_zero_pp_rank|mp_rank|zero)_.*\.pt|global_step\d+": (
        "a DeepSpeed training state; run `python zero_to_fp32.py . pytorch_model.bin` in it first"
    ),
    r"consolidated.*\.(pth|safetensors)": "weights in their maker's own layout; name the Hugging Face version of it",
    r"(flax_model|tf_model).*": "Flax or TensorFlow weights; load and save them with transformers first",
    r".*\.(ckpt|pt|pth)": "a training checkpoint; save its state_dict as pytorch_model.bin first",
    r".*\.onnx": "an ONNX model; name the checkpoint that it was made from",
    r".*\.(bin|safetensors)": "weights under another name; rename them to model.safetensors or pytorch_model.bin",
}
EXPERT_SHARD = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+.*")

# Names that only quantized layers have, and who makes them.
QUANTIZED = {
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)": "4-bit (bitsandbytes)",
    r".*\.(SCB|weight_format)": "8-bit (bitsandbytes)",
    r".*\.(qweight|qzeros|g_idx)": "quantized (GPTQ or AWQ)",
    r".*\.(weight_packed|weight_scale(_inv)?|weight_zero_point|input_scale)": "quantized (compressed-tensors)",
}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find the tensors of a checkpoint without reading them.

    Args:
        folder: a folder with ``config.json``, or an adapter's own, and PyTorch or safetensors weights.

    Returns:
        The checkpoint. Safetensors win over PyTorch's own files, and shards with an index over a single file.

    Raises:
        UserError: there is nothing to convert, files are missing or disagree, or the weights are of a kind that is not
            converted (quantized, expert-parallel shards, GGUF, ...). The message names the file and the remedy.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name the folder that has the checkpoint's config.json")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if experts := [name for name in names if EXPERT_SHARD.fullmatch(name)]:
        raise UserError(
            f"{folder / experts[0]}: experts in files of their own (expert parallelism of DeepSpeed) are not "
            "supported; save the model with ep_size 1"
        )
    config: dict[str, Any] = {}
    # Peft saves adapters without the model's config, LLaVA with it.
    if "config.json" in names or LORA_CONFIG not in names:
        config = _read_json(folder / "config.json", "a checkpoint has a config.json; copy it from the model's source")
    checkpoint = Checkpoint(folder, config, {}, [])
    for entry in FORMATS:
        if files := _weight_files(folder, entry, names):
            _refuse_quantized_config(folder, config)
            checkpoint.tensors = _open_weights(folder, entry, files, names)
            checkpoint.files = files
            break
    _refuse_quantized_tensors(folder, checkpoint.tensors)
    _add_adapter(checkpoint, names)
    _add_roles(checkpoint, names)
    if not checkpoint.files:
        raise UserError(f"{folder}: {_what_else(names)}")
    return checkpoint


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; fetch it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return data


def _weight_files(folder: Path, entry: Format, names: list[str]) -> list[Path]:
    """The files of the full weights in one format, or none."""
    if entry.index_file in names:
        return [folder / name for name in sorted(set(_weight_map(folder / entry.index_file).values()))]
    if entry.single in names:
        return [folder / entry.single]
    # Shards that lost their index: their own names say whether all are there.
    shards = {name: match for name in names if (match := entry.shard.fullmatch(name))}
    if not shards:
        return []
    counts = {int(match[2]) for match in shards.values()}
    missing = set(range(1, max(counts) + 1)) - {int(match[1]) for match in shards.values()}
    if len(counts) > 1 or missing:
        what = (
            f"shard {min(missing)} of {max(counts)}" if missing else "an index that says which shards belong together"
        )
        raise UserError(f"{folder}: {next(iter(shards))} is there without {what}; fetch the checkpoint again")
    return [folder / name for name in shards]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names to file names, as an index has them."""
    table = _read_json(index, "fetch the checkpoint again").get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index}: has no weight_map; fetch the checkpoint again")
    for name in table.values():
        # A name with a folder in it could make us read any file of the machine.
        if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
            raise UserError(f"{index}: {name!r} is not a file name inside the checkpoint's folder")
    return table


def _open_weights(folder: Path, entry: Format, files: list[Path], names: list[str]) -> dict[str, Tensor]:
    """Open the full weights; every file that claims to hold the same model must name the same tensors."""
    if missing := [file.name for file in files if file.name not in names]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder / entry.index_file}: names {missing[0]}{more}, not there; fetch the checkpoint again")
    tensors = entry.open(files)
    if entry.index_file in names and (absent := sorted(_weight_map(folder / entry.index_file).keys() - tensors.keys())):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(
            f"{folder / entry.index_file}: tensor {absent[0]!r}{more} is in none of the shards; "
            "fetch the checkpoint again"
        )
    for other in FORMATS:
        if other.single in names and folder / other.single not in files:
            _compare(folder / other.single, other, tensors)
    return tensors


def _compare(file: Path, entry: Format, tensors: dict[str, Tensor]) -> None:
    """A second file of full weights is not used, but one of another model shows that something went wrong."""
    try:
        found = entry.open([file])
    except UserError:  # it is of no use to anyone; the tensors that we have are whole
        return
    differ = sorted(name for name in found.keys() ^ tensors.keys() if not OPTIONAL.fullmatch(name))
    if differ:
        where = "only in it" if differ[0] in found else "not in it"
        raise UserError(
            f"{file}: holds other tensors than the weights beside it ({differ[0]!r} is {where}); "
            "move the one that is not meant out of the folder"
        )


def _refuse_quantized_config(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise UserError(
        f"{folder / 'config.json'}: quantization_config says that the weights are quantized "
        f"({method or 'unknown method'}); convert the unquantized checkpoint and choose --quantize"
    )


def _refuse_quantized_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    for pattern, what in QUANTIZED.items():
        if names := [name for name in tensors if re.fullmatch(pattern, name)]:
            raise UserError(
                f"{folder}: tensor {names[0]!r} shows that the weights are {what}; "
                "convert the unquantized checkpoint and choose --quantize"
            )


def _add_adapter(checkpoint: Checkpoint, names: list[str]) -> None:
    folder = checkpoint.folder
    for name, opened in ADAPTERS.items():
        if name not in names:
            continue
        if checkpoint.tensors:
            raise UserError(
                f"{folder / name}: an adapter beside full weights that may already contain it; "
                "move the one that is not meant out of the folder"
            )
        remedy = "an adapter has one, which says how strong it is; copy it from where the adapter was trained"
        checkpoint.adapter_config = _read_json(folder / LORA_CONFIG, remedy)
        checkpoint.adapter = opened([folder / name])
        checkpoint.files.append(folder / name)
        return
    # LoRA factors inside the full weights (MoE-LLaVA): its config keeps what adapter_config.json would say.
    lora = checkpoint.config.get("lora")
    if isinstance(lora, dict) and any(".lora_A." in tensor for tensor in checkpoint.tensors):
        keys = {"lora_alpha": "lora_alpha", "lora_r": "r", "lora_bias": "bias"}
        checkpoint.adapter_config = {ours: lora[theirs] for theirs, ours in keys.items() if theirs in lora}


def _add_roles(checkpoint: Checkpoint, names: list[str]) -> None:
    if checkpoint.tensors:
        return
    for role, name in ROLES.items():
        if name in names:
            setattr(checkpoint, role, open_torch([checkpoint.folder / name]))
    if any("mm_projector." in tensor for tensor in checkpoint.non_lora):
        checkpoint.projector = {}  # trained on beside LoRA, so stage 1's is an older one
    used = [name for role, name in ROLES.items() if getattr(checkpoint, role)]
    checkpoint.files += [checkpoint.folder / name for name in used]


def _what_else(names: list[str]) -> str:
    """What a folder without weights is, and the remedy."""
    for pattern, what in FOREIGN.items():
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f"has no weights but {found[0]}: {what}"
    return "has no weights; a checkpoint has model.safetensors, pytorch_model.bin or shards of one of them"
