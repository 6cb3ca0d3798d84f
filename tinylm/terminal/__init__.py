"""The story prompt of `tinylm write`, shell completion, and the output and errors of all commands."""
