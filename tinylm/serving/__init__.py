"""What `serve_app` is made of beside the engine: who may ask, how the service is, what it writes down and counts.

The only part of `tinylm` that may import Ray.
"""
