"""Kernels alone: attention, the layers' small operations, matrix products, sampling.

    python -m dev.bench kernels
    python -m dev.bench kernels --suite prefill --case 8x2048 --case 512+7936 --num-heads 32
    python -m dev.bench kernels --suite matmul --case norm_linear:16x4096x1024

A suite has cases, and subjects that all do the same on them. Each call has inputs of its own, so
that weights and caches come from memory and not from a cache that the call before has filled. On a
GPU a graph of such calls is replayed (``us``), and calls are launched one by one from Python
(``us_per_call``: what the host adds when nothing hides it).

====================  ==============================================================================
suite                 cases
====================  ==============================================================================
decode, ragged        BxS: B sequences of S cached tokens, one query each; BxA:C spreads lengths
                      evenly from A to C; parts are joined by +, like 1x16384+63x200
prefill               BxS: B prompts of S tokens; S+C: S tokens behind C cached ones
ops                   add_rms_norm, qk_norm_rope (with the write into the cache) and silu_mul, each
                      :R for R rows
matmul                linear, norm_linear and norm_gate_up, each :MxNxK for x[M, K] and weight[N, K]
int4                  int4 and int4_asymmetric, each :MxNxKxG for x[M, K], weight[N, K], groups of G
sampling              greedy, temperature and top_k_top_p, each :B for B rows of logits
====================  ==============================================================================

Subjects: a milestone and its backend; ``torch`` (plain operations, the twins), ``fused``
(``common.ops``, products by cuBLAS) and ``skinny`` (our products too); ``int4`` (weights unpacked
on the way) and ``dequantized`` (before); ``FlashAttention-3``, ``flash_attn``, ``SDPA`` and, of
sampling, ``textbook``. Kernels that a decode step starts early are started early here too.
"""

from dev.bench.kernels.command import main
from dev.bench.kernels.peers import flash_attention_3

HELP = "attention, small operations, products and sampling alone, in us, GB/s and TFLOP/s"

__all__ = ["HELP", "flash_attention_3", "main"]
