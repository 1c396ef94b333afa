"""Whether llama.cpp should rearrange a model's weights for its CPU kernels: mostly yes, for experts in K-quants no.

When it loads a model for the CPU, llama.cpp rearranges matrices of some types so that eight rows lie side by side. That
makes decoding faster. But for experts it has rearranged, it computes a prompt token by token, each token reading the
whole expert again. The same experts as they are stored go through its tiled kernels, many tokens at a time: on x86
processors a prompt is read about 2.6 times as fast, and an answer is made two thirds as fast (docs/benchmarks.md). A
question about a picture has hundreds of tokens and its answer few, so the prompt counts.

The tiled kernels exist for x86 with AVX, and for K-quants and IQ types. Of these llama.cpp rearranges the two below.
"""

from __future__ import annotations

import platform

from gm_mlx.gguf_file import GGUFHeader

X86 = ("x86_64", "AMD64")
REARRANGED = ("Q4_K", "Q2_K")  # that have tiled kernels


def should_repack(header: GGUFHeader) -> bool:
    """The better choice for questions about pictures on this machine."""
    experts = {tensor.type for name, tensor in header.tensors.items() if "_exps." in name}
    return platform.machine() not in X86 or experts.isdisjoint(REARRANGED)
