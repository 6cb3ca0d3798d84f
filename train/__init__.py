"""From text to a model directory: prepare, tokenizer, encode, run, export, evaluate — each a command of its own.

Imports PyTorch and Ray, and of `tinylm` what reads and writes models, and the engine that judges them.
"""
