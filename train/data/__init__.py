"""Text sources, token shards, and the training and validation rows made of them. No module imports the model or Ray."""
