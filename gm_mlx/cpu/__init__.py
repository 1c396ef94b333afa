"""Layers for MLX's CPU backend, computed by NumPy where MLX is slow.

That backend works on one core, but for float32 products, which are BLAS's (``gm_mlx._blas``). It has no tuned kernel
for quantized weights: it multiplies one number after the other, at 2 GFLOP/s. It is far faster to unpack a piece of the
matrix to float32 and to multiply that with the BLAS that NumPy brings, on all cores. Exponentials, as activations and
attention have them, are thirty times faster in NumPy.

NumPy needs values, so these layers evaluate what they are given, and the gradients too. Inside ``mx.compile``, where
nothing can be evaluated, the stock layers run.
"""

from gm_mlx.cpu.cores import released
from gm_mlx.cpu.experts import expert_products
from gm_mlx.cpu.layers import BASES, FastBlock, is_fast, speed_up
from gm_mlx.cpu.linears import linear
from gm_mlx.cpu.loss import cross_entropy

__all__ = ["BASES", "FastBlock", "cross_entropy", "expert_products", "is_fast", "linear", "released", "speed_up"]
