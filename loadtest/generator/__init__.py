"""Make the calls of a run: which requests, by which protocol, in which loop, in which processes."""
