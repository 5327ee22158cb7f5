"""The round as pure functions on tensors: budget, sampling distribution, coins, acceptance, penalties.

Knows nothing of SGLang, of KV slots or of kernels. Nothing here waits for the device, so that a round can be enqueued
ahead of the GPU; shapes never depend on data. Names follow SGLang: ``accept_*`` counts the bonus token, ``correct_*``
does not. SparseSpec (arXiv:2512.01278, version 1) keeps chain rejection sampling (Leviathan et al. 2023).
"""
