"""The side that asks: calls, the loops that make them, and the processes that run the loops."""
