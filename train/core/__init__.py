"""The model in PyTorch and the loop that trains it. Knows nothing of Ray and of files other than checkpoints."""
