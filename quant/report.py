"""What quantization did, as rows for people: one table for the terminal, the README and the model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gm_mlx.quant.quantize import Quantized, Source
from gm_mlx.quant.recipes import RECIPES
from gm_mlx.quant.sizes import Size, component_sizes, total

Row = tuple[str, list[str]]

LABELS = {
    "tower": "vision tower",
    "projector": "projector",
    "embeddings": "embeddings, head",
    "attention": "attention",
    "dense_ffn": "dense FFNs",
    "experts": "experts",
    "routers": "routers",
    "norms": "norms",
}
MEASURED: dict[str, Callable[[Quantized], float | None]] = {
    "KL divergence": lambda result: result.agreement and result.agreement.kl,
    "same likeliest token": lambda result: result.agreement and result.agreement.top1,
    "same first expert": lambda result: result.agreement and result.agreement.routing_top1,
    "same experts": lambda result: result.agreement and result.agreement.routing_set,
    "exact match": lambda result: result.exact_match,
}


def table(source: Source, results: Sequence[Quantized], baseline: float | None = None) -> tuple[list[str], list[Row]]:
    """Header and rows: sizes by component, bits per weight, and what was measured.

    Args:
        source: the unquantized model, the first column.
        results: a column each.
        baseline: exact match of the unquantized model, if it was measured.
    """
    plain = component_sizes(source.config)
    header = ["", "unquantized", *(result.recipe for result in results)]
    columns = [plain, *(result.sizes for result in results)]
    rows: list[Row] = [(LABELS[name], [megabytes(sizes[name]) for sizes in columns]) for name in plain]
    rows.append(("all", [megabytes(total(sizes)) for sizes in columns]))
    rows.append(("bits per weight", [f"{total(sizes).bits_per_weight:.2f}" for sizes in columns]))
    for name, measure in MEASURED.items():
        values = [measure(result) for result in results]
        if any(value is not None for value in values):
            first = "–" if name != "exact match" or baseline is None else share(baseline)
            rows.append((name, [first, *(_shown(name, value) for value in values)]))
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *([name, *cells] for name, cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def megabytes(size: Size) -> str:
    """A size in the units of memory, precise enough to compare recipes (1 MB = 2**20 bytes)."""
    value = size.bytes / 2**20
    if value < 1:
        return f"{value * 1024:.1f} KB"
    return f"{value / 1024:.3f} GB" if value >= 1000 else f"{value:.2f} MB"


def share(value: float) -> str:
    return f"{value:.2%}"


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if name == "KL divergence" else share(value)


def model_card(old: str, name: str, source: Source, result: Quantized, version: str) -> str:
    """The card of a quantized model: the old card, with a section that says what was done to it.

    Args:
        old: the source's card, or "" when it has none.
        name: what the source was called.
        source: the unquantized model.
        result: what the recipe made of it.
        version: of gm-mlx.
    """
    marker = "## Quantization\n"
    kept = old.partition(marker)[0].rstrip() or f"# {name}"  # of a card of ours, the part before the old section
    again = "\n\nThe source was quantized before: its rounded weights were rounded again." if source.requantized else ""
    return (
        f"{kept}\n\n{marker}\n`{result.recipe}` by gm-mlx {version}, from {name}: {RECIPES[result.recipe].summary}."
        f"{again}\n\n{markdown(*table(source, [result]))}"
    )


def warnings(result: Quantized) -> list[str]:
    """What a user should know about a result, a line each."""
    lines = []
    for what in dict.fromkeys(result.plan.adjusted.values()):
        paths = [path for path, said in result.plan.adjusted.items() if said == what]
        more = f" (and {len(paths) - 1} more layers like it)" if len(paths) > 1 else ""
        lines.append(f"{result.recipe}: {paths[0]} {what}{more}")
    awq: Mapping = result.steps.get("awq", {})
    if unused := awq.get("unused_experts"):
        named = ", ".join(f"{expert} of layer {layer}" for layer, expert in unused[:4])
        lines.append(
            f"{result.recipe}: {len(unused)} experts saw no token of the calibration data and are not scaled "
            f"({named}{', ...' if len(unused) > 4 else ''}); give more --samples"
        )
    return lines + [f"{result.recipe}: {note}" for note in awq.get("notes", [])]
