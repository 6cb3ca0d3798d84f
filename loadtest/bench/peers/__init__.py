"""Measure TinyLM's engine beside other engines: the same model shape on one core."""
