"""Train a model from text. Each stage is a command: prepare, tokenizer, encode, run (or alone), export.

`data` makes training rows, `core` trains on them, and `release` describes and converts the result.
"""
