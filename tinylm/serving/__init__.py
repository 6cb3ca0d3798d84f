"""Everything between a caller and the engine: protocols, access, the log line of a call, and metrics.

`grpc` and `http` hold one protocol each. `ray` holds everything that depends on Ray's internals.
"""
