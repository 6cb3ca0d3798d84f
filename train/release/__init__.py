"""What an exported model is judged by and what its pages say. Knows nothing of training."""
