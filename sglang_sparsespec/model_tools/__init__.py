"""Small models to run the package with: one real one for a first try, random ones for tests.

Reads and writes checkpoints with transformers; imports neither SGLang nor the rest of this package.
"""
