"""The model in PyTorch, the loop that trains it, and what a run stores. Ray is only needed to read its checkpoints."""
