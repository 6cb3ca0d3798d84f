"""The arithmetic of the transformer on arrays, one file per implementation, each with the same functions.

`numpy` is the readable reference. `tinylm.model` calls these functions and nothing below them.
"""
