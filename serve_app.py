"""The Ray Serve deployment: one replica's service, asked over gRPC and over HTTP. Holds no model code.

    serve run configs/serve.yaml

`build_app` is the typed builder that the YAML's `args` go to. Balancing over replicas is Ray Serve's business; what the
two protocols say is in `tinylm.serving.grpc.methods` and `tinylm.serving.http.completions`.
"""

# No `from __future__ import annotations` here: Serve reads the builder's annotation to make its argument.

from fastapi import FastAPI
from ray import serve

from tinylm.serving.grpc.health import HealthMethods
from tinylm.serving.grpc.methods import GrpcMethods
from tinylm.serving.http.app import build_http_app
from tinylm.serving.http.live import LiveMethods
from tinylm.serving.service import AppArgs, Service


def build_app(args: AppArgs) -> serve.Application:
    """The application; relative paths are made absolute here, since replicas have directories of their own."""
    paths = {"model": args.model.resolve(), "api_keys": args.api_keys and args.api_keys.resolve()}
    return TinyLM.bind(args.model_copy(update=paths))  # type: ignore[attr-defined]


@serve.deployment
@serve.ingress()
class TinyLM(GrpcMethods, HealthMethods, LiveMethods):
    """One replica."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it, on the replica's loop
        self.service = Service(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor: what answers HTTP."""
        return build_http_app(self.service)

    async def check_health(self) -> None:
        """Called by Serve, which would give a plain method a thread each time.

        An engine that died or stalled gets the replica replaced.
        """
        self.service.check_health()

    def _is_healthy(self) -> bool:
        return self.service.is_healthy()
