"""Serve the engine: protocols, access control, metrics, and one log line per call.

`grpc` and `http` hold one protocol each. `ray` holds everything that depends on Ray's internals.
"""
