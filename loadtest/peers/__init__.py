"""Other engines on the same model: a comparison on one core, run by `python -m loadtest.peers`."""
