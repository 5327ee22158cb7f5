"""The acceptance explorer: what sparse drafts predict on a local Hugging Face model, without a server.

`python -m sglang_sparsespec.acceptance MODEL`; docs/acceptance.md explains the numbers. The policies and ops are those
of the server; transformers runs the rest of the model.

    model.py        the model with attention over a paged KV pool in the place of its own
    rounds.py       a draft-verify round, and the selection that its verify refreshes
    channels.py     feed-forward channels that drafts go without
    measure.py      rounds over texts: forced along a text, or along what the model writes
    traces.py       rounds one by one with the draft's confidence; what stopping on it would have changed
    effort.py       what early stops and other budgets are worth, by the cost model
    settings.py     the cross of options, without doubles
    report.py       table, JSON lines; plot.py draws
    cli.py          the command
"""
