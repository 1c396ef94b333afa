"""What does sparsity cost? Times a mixture of experts against a dense feed-forward network of equal active width.

    python examples/bench_moe.py                # 1, 16 and 600 tokens at Gemma-2B's shapes
    python examples/bench_moe.py --stock-600    # MLX's own kernels at 600 tokens too: several minutes on a CPU

Both layers are quantized to 4 bits in groups of 64. The sparse one has 4 experts and sends a token to 2 of them; the
dense one is twice as wide as an expert, so that both multiply a token with as many weights. The router is included.
"stock" is MLX as it is; "fast" is ``gm_mlx.cpu``, with which a model runs on MLX's CPU backend.
"""

from __future__ import annotations

import argparse
import os
import platform
from statistics import median
from time import perf_counter

import gm_mlx._blas  # before mlx, which it finds a BLAS for

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
from mlx.utils import tree_map  # isort: skip

from gm_mlx.config import MoEConfig, TextConfig
from gm_mlx.cpu import speed_up
from gm_mlx.moe import MLP, SparseMLP

# At the default shapes the stock kernels take a fifth of a second per token on a CPU.
MANY_TOKENS_FOR_STOCK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 600])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each layer, in turns; the median is printed")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=16384, help="width of one expert")
    parser.add_argument("--stock-600", action="store_true", help="stock kernels at many tokens too, one run each")
    args = parser.parse_args()

    print(f"{platform.machine()}, {os.cpu_count()} cores; mlx {mx.__version__}; BLAS: {gm_mlx._blas.status()}")
    print(f"hidden {args.hidden}, 4 experts of {args.ffn} (top-2) against one network of {2 * args.ffn}; 4-bit")
    columns = f"{'tokens':>6} {'kernels':>8} {'sparse ms':>10} "
    columns += f"{'dense ms':>10} {'sparse/dense':>13} {'runs':>5} {'speed-up':>9}"
    print("\n" + columns)

    config = text_config(args.hidden, args.ffn)
    wide = text_config(args.hidden, 2 * args.ffn)
    assert config.moe is not None
    layers = [random_weights(layer) for layer in (SparseMLP(config, config.moe, layer=0), MLP(wide))]
    stock: dict[int, float] = {}
    for kernels in ("stock", "fast"):
        if kernels == "fast":
            for layer in layers:
                speed_up(layer)
        for tokens in args.tokens:
            slow = kernels == "stock" and tokens > MANY_TOKENS_FOR_STOCK
            if slow and not args.stock_600:
                continue
            runs = 1 if slow else args.runs
            sparse, dense = in_turns(layers, tokens, args.hidden, runs)
            if kernels == "stock":
                stock[tokens] = sparse
            gain = f"{stock[tokens] / sparse:.1f}" if tokens in stock else "-"
            print(
                f"{tokens:>6} {kernels:>8} {sparse:>10.1f} {dense:>10.1f} {sparse / dense:>13.2f} {runs:>5} {gain:>9}"
            )


def text_config(hidden: int, ffn: int) -> TextConfig:
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=1,
        moe=MoEConfig(num_experts=4, top_k=2),
    )


def random_weights(layer: nn.Module) -> nn.Module:
    """The layer in 4 bits, with random codes: to quantize random numbers would take longer than to time them."""
    nn.quantize(layer, group_size=64, bits=4)

    def random(a: mx.array) -> mx.array:
        if a.dtype == mx.uint32:
            return mx.random.randint(-(2**31), 2**31 - 1, a.shape).view(mx.uint32)
        return mx.random.uniform(-0.01, 0.01, a.shape).astype(mx.bfloat16)

    layer.update(tree_map(random, layer.parameters()))
    mx.eval(layer.parameters())
    return layer


def in_turns(layers: list[nn.Module], tokens: int, hidden: int, runs: int) -> list[float]:
    """Median milliseconds of each layer. They take turns, so that whatever else the machine does slows both."""
    x = mx.random.normal((1, tokens, hidden))
    mx.eval(x)
    times: list[list[float]] = [[] for _ in layers]
    for _ in range(runs):
        for layer, log in zip(layers, times, strict=True):
            start = perf_counter()
            mx.eval(layer(x))
            log.append((perf_counter() - start) * 1e3)
    return [median(log) for log in times]


if __name__ == "__main__":
    main()
