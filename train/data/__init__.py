"""Token shards into training rows and validation rows. Knows nothing of the model and of Ray."""
