"""Kernels on tensors, one folder per op: attention over chosen or paged KV, its scores, top-k, sampling from logits.

Each folder holds the public function (contract, checks, dispatch), ``reference.py`` (ground truth), ``torch_impl.py``
and, where it pays, ``triton_impl.py``. Nothing here knows of SGLang, rounds or policies: tensors in, tensors out.
Realises PillarAttn's two kernels: dense attention that yields scores, and sparse attention over a selection
(SparseSpec, arXiv:2512.01278). Invariant: on CUDA no op reads a device value from the host.

Dimensions, everywhere below: ``R`` requests, ``T`` query tokens, ``HQ`` query heads, ``H`` KV heads, ``G = HQ / H``,
``D`` head dim, ``S`` listed KV entries, ``N`` kv length.
"""
