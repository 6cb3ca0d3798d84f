"""Make the calls of a run: workload, protocols, loops and processes."""
