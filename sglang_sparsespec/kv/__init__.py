"""KV beyond the device pool: which requests wait in host memory, where their KV lies there, and when they move.

Nothing here knows the host: `policy` decides over plain records, `ledger` keeps the accounts, `offload` copies.
"""
