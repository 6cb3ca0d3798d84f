"""From text to a model directory: prepare, tokenizer, encode, run, export, evaluate — each a command of its own.

Imports PyTorch and Ray; of `tinylm` only the config, the tokenizer and the weights (and, to evaluate, the engine).
"""
