"""The Ray Serve deployment: one replica of the service, over gRPC and HTTP.

    serve run configs/serve.yaml

`build_app` builds the application from the YAML's `args`. `tinylm.serving.grpc.methods` and `tinylm.serving.http`
implement the two protocols.
"""

# No `from __future__ import annotations` here: Serve reads the builder's annotation to make its argument.

import os
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from tinylm.serving.grpc.health import HealthMethods
from tinylm.serving.grpc.methods import GrpcMethods
from tinylm.serving.http.app import build_http_app
from tinylm.serving.live import LiveMethods
from tinylm.serving.service import AppArgs, Service


def build_app(args: AppArgs) -> serve.Application:
    """Return the application."""
    return TinyLM.bind(with_absolute_paths(args))  # type: ignore[attr-defined]


def with_absolute_paths(args: AppArgs) -> AppArgs:
    """Return `args` for a replica, whose working directory differs.

    `model` has no symbolic links: Serve replaces the replicas when the config is deployed again and a link has a new
    target. `api_keys` keeps its links: Kubernetes changes a secret by giving a new target to a link.
    """
    model = Path(os.path.realpath(args.model))  # unlike Path.resolve, it accepts links in a circle
    return args.model_copy(update={"model": model, "api_keys": args.api_keys and args.api_keys.absolute()})


@serve.deployment
@serve.ingress()
class TinyLM(GrpcMethods, HealthMethods, LiveMethods):
    """One replica."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it in the replica's loop
        self.service = Service(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application. Serve calls this after the constructor."""
        return build_http_app(self.service)

    async def check_health(self) -> None:
        """Raise EngineDied for an engine that ended or stalled, so that Serve replaces the replica.

        Serve runs a plain method in a new thread each time, but a coroutine in the event loop.
        """
        self.service.check_health()

    def _is_healthy(self) -> bool:
        return self.service.is_healthy()
