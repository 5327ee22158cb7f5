"""What sparse computation in a verify does to a model's output, on a local Hugging Face model, without a server.

`python -m sglang_sparsespec.quality`; docs/lossy_quality.md explains the numbers. The rules are those of `sparsity`,
the model with its paged KV is the acceptance explorer's.

    settings.py     what is compared: the cross of options, without doubles
    rounds.py       the attention of one sparse verify
    rules.py        channels and experts dropped from the model's own layers
    walk.py         rounds along a given text, and along what the model writes
    needles.py      a task with right and wrong answers, made from any text
    measure.py      a setting against the dense model
    calibrate.py    how alike layers choose
    report.py       table, JSON lines; plot.py draws
    cli.py          the commands
"""
