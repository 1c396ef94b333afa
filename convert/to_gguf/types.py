"""What ``--quantize`` asks for in a GGUF file: llama.cpp's file types, and our recipes in llama.cpp's tensor types.

A file type is a rule of llama.cpp: the type of most tensors, and more bits for those that deserve them, such as
``ffn_down`` of the first and last layers in Q4_K_M. A recipe names the type of each component instead, as it does for
MLX, so llama.cpp's own rules never apply.

K-quants come in blocks of 256 weights and IQ types (but IQ4_NL) too, all others in blocks of 32. Where a row does not
divide into blocks, llama.cpp takes a type in blocks of 32 with more bits, or half precision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gm_mlx.errors import UserError
from gm_mlx.gguf_file import TENSOR_TYPES as GGML_TYPES

NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
BLOCKS = {name: block for name, block, _ in GGML_TYPES.values()}  # weights of a row that are packed together


class FileType(NamedTuple):
    """A file type of llama.cpp.

    Attributes:
        number: in ``general.file_type``, of the enum ``llama_ftype``.
        main: the type that its rule begins with.
        needs_imatrix: whether the rule has types that come out as garbage without an importance matrix.
        components: the rule, where it is as simple as a recipe.
    """

    number: int
    main: str
    needs_imatrix: bool = False
    components: Mapping[str, str] | None = None


MXFP4_EXPERTS = {
    "experts": "MXFP4",
    **dict.fromkeys(("dense_ffn", "attention", "embeddings", "tower"), "Q8_0"),
    "projector": "F16",
}


# The types that the gguf package can quantize to without llama.cpp.
GGUF_PY_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")

FILE_TYPES = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q6_K": FileType(18, "Q6_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q4_0": FileType(2, "Q4_0"),
    "MXFP4_MOE": FileType(38, "MXFP4", components=MXFP4_EXPERTS),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "IQ3_M": FileType(27, "IQ3_S"),
    "IQ3_S": FileType(26, "IQ3_S"),
    "IQ3_XS": FileType(22, "IQ3_S", needs_imatrix=True),
    "IQ3_XXS": FileType(23, "IQ3_XXS", needs_imatrix=True),
    "Q2_K": FileType(10, "Q2_K"),
    "Q2_K_S": FileType(21, "Q2_K", needs_imatrix=True),
    "IQ2_M": FileType(29, "IQ2_S", needs_imatrix=True),
    "IQ2_S": FileType(28, "IQ2_XS", needs_imatrix=True),
    "IQ2_XS": FileType(20, "IQ2_XS", needs_imatrix=True),
    "IQ2_XXS": FileType(19, "IQ2_XXS", needs_imatrix=True),
    "IQ1_M": FileType(31, "IQ1_M", needs_imatrix=True),
    "IQ1_S": FileType(24, "IQ1_S", needs_imatrix=True),
}
ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "MXFP4": "MXFP4_MOE"}

# The nearest tensor type to MLX's bits and mode. A K-quant has scales of its own for every 16 or 32 weights, as MLX has
# for every 32 or 64, and takes the same half a bit per weight for them.
TENSOR_TYPES = {
    (2, "affine"): "Q2_K",
    (3, "affine"): "Q3_K",
    (4, "affine"): "Q4_K",
    (5, "affine"): "Q5_K",
    (6, "affine"): "Q6_K",
    (8, "affine"): "Q8_0",
    (4, "mxfp4"): "MXFP4",
}
FLOAT = "F16"
FLOAT_TYPES = ("F32", "F16", "BF16")
# What a file says it is when most of it has this type; readers show it and do nothing else with it.
NAMED_AFTER = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}

# The matrices of each component of ``gm_mlx.inventory``. The patterns are read by Python and by std::regex.
COMPONENTS = {
    "embeddings": r"^(token_embd|output)\.weight$",
    "attention": r"^blk\.[0-9]+\.attn_(q|k|v|output)\.weight$",
    "dense_ffn": r"^blk\.[0-9]+\.ffn_(gate|up|down)(_shexp)?\.weight$",  # the second are step35's zeros
    "experts": r"^blk\.[0-9]+\.ffn_(gate|up|down)_exps\.weight$",
}

REFUSED = {
    "mixed": "its bits are measured for MLX's formats; take q4 or Q4_K_M, or IQ3_XS where every byte counts",
    "awq": "it is q4 with scales folded into the weights; the same for GGUF is `--quantize q4 --imatrix FILE`",
}

Precisions = Mapping[str, tuple[int, int, str] | None]


@dataclass(frozen=True)
class Target:
    """What a GGUF file is to be.

    Attributes:
        name: "Q4_K_M" or "q4".
        file_type: the number for ``general.file_type``.
        main: the type of most tensors.
        components: the type of each component's matrices. Empty for a file type, where llama.cpp's rule decides.
        needs_imatrix: whether llama.cpp refuses to make it without an importance matrix.
    """

    name: str
    file_type: int
    main: str
    components: Mapping[str, str]
    needs_imatrix: bool = False

    @property
    def needs_llama_cpp(self) -> bool:
        """Whether the gguf package cannot write it by itself."""
        used = [self.main, *(kind for part, kind in self.components.items() if part in COMPONENTS)]
        return not set(used) <= set(GGUF_PY_TYPES)

    def tensor_type(self, name: str) -> str:
        """The type that a matrix is meant to have; where llama.cpp's rules decide, the type that they begin with."""
        component = component_of(name)
        return self.components.get(component, self.main) if component else self.main

    def vision_types(self) -> dict[str, str]:
        """The types of an mmproj file's matrices, by "tower" and "projector". Only the gguf package writes those.

        The pixels of a prompt are hundreds of tokens, so a tower keeps 8 bits and a projector its floats, as in the
        recipes for MLX, unless the recipe says otherwise.
        """
        if self.components:
            parts = {part: self.components[part] for part in ("tower", "projector")}
            return {part: kind if kind in GGUF_PY_TYPES else "Q4_0" for part, kind in parts.items()}
        floats = self.main in FLOAT_TYPES
        return {"tower": self.main if floats else "Q8_0", "projector": self.main if floats else FLOAT}


def find_target(name: str, recipes: Mapping[str, Precisions]) -> Target:
    """What a name after ``--quantize`` stands for.

    Args:
        name: a file type in upper or lower case, or a recipe.
        recipes: by name of a recipe: (bits, group size, mode) of each component, None for floats; those of
            ``gm_mlx.quant.recipes.RECIPES``.

    Raises:
        UserError: there is no such name, or the recipe makes no sense for GGUF.
    """
    if name in REFUSED:
        raise UserError(f"--quantize {name}: is for model folders: {REFUSED[name]}")
    if name in recipes:
        return _from_recipe(name, recipes[name])
    upper = ALIASES.get(name.upper(), name.upper())
    if upper not in FILE_TYPES:
        known = [*(recipe for recipe in recipes if recipe not in REFUSED), *FILE_TYPES]
        raise UserError(f"--quantize {name}: not one of {', '.join(known)}")
    kind = FILE_TYPES[upper]
    return Target(upper, kind.number, kind.main, kind.components or {}, kind.needs_imatrix)


def _from_recipe(name: str, precisions: Precisions) -> Target:
    components = {}
    for component, precision in precisions.items():
        bits, _, mode = precision or (16, 0, "")
        components[component] = TENSOR_TYPES[bits, mode] if precision else FLOAT
    main = components["experts"]  # four fifths of the weights
    return Target(name, FILE_TYPES[NAMED_AFTER.get(main, main)].number, main, components)


def require_imatrix(target: Target, given: bool) -> None:
    """Refuse what llama.cpp cannot make well without an importance matrix."""
    if target.needs_imatrix and not given:
        raise UserError(
            f"--quantize {target.name}: needs an importance matrix; make one from the model folder with `gm-mlx "
            "imatrix MODEL -o imatrix.gguf` and add --imatrix imatrix.gguf"
        )


def component_of(name: str) -> str | None:
    """The component whose matrix a tensor of a text model is; None for routers, norms and all that never quantizes."""
    return next((part for part, pattern in COMPONENTS.items() if re.search(pattern, name)), None)


def fits(kind: str, width: int) -> bool:
    """Whether rows of ``width`` weights divide into the type's blocks."""
    return width % BLOCKS[kind] == 0
