"""Sparse self-speculative decoding for SGLang (SparseSpec, arXiv:2512.01278, version 1).

Where things live; imports go one way, from the bottom of this list to its top:

* ``errors``, ``config``     what the user may ask for, validated once
* ``request_options``        what one request may ask for, validated once
* ``ops``                    kernels: one folder each, with a plain torch reference beside the fast versions
* ``speculation``            the round as pure functions: budget, sampling distribution, acceptance, penalties
* ``selection``              which KV tokens a draft may see: one policy per file
* ``sparsity``               what a forward may leave out: rules for KV blocks, channels and experts, as pure functions
* ``kv``                     requests whose KV waits in host memory: who moves when, accounts, copies
* ``acceptance``             what drafts predict on a local model, without a server: a command
* ``quality``                what sparsity costs in output on a local model, without a server: a command
* ``adapter``                the only code that imports SGLang: worker, attention backend, server arguments
* ``patches``                the changes to the host that neither registration nor a subclass can make
* ``plugin``                 the entry point that SGLang calls

Beside them, for people and tests: ``model_tools`` (small checkpoints) and ``bench`` (servers as processes, measured).
"""

__version__ = "0.1.0"

from pathlib import Path as _Path

# in a checkout `patches/` and `kernels/` lie beside this folder; an installed package has them inside
if not (_Path(__file__).parent / "patches").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))
