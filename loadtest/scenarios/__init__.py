"""Ready-made sequences of runs, and what they show together."""
