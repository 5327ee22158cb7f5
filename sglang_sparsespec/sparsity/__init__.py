"""Rules by which a forward computes less than the model says (arXiv:2512.21911): KV blocks, channels, experts.

In a draft they change nothing but how many drafts are accepted. In a verify they change the output, and a server says
so.
Plain torch, shapes in the docstrings; who applies a rule to a model is the adapter's or the explorer's business.
"""
