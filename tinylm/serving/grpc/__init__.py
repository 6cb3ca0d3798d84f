"""The service over gRPC: `tinylm.v1.TinyLM` and the standard health service."""
