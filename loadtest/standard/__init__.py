"""The standard set of measurements: `python -m loadtest standard`."""
