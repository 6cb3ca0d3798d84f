"""Every private part of Ray that TinyLM uses, one function for each. Read in Ray 2.60.0.

No other module of TinyLM uses a name of Ray that begins with an underscore or lies in a `_private` package.
Each function states why TinyLM needs the private part, and what in Ray would make it unnecessary.
`tests/tinylm/serving/ray/test_internals.py` fails with the function's name when Ray changes such a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS
from ray.serve._private.proxy import gRPCProxy
from ray.util.metrics import Counter

READ_IN = "2.60"  # the Ray release whose source these functions were read in

MAX_METADATA_BYTES = 64 * 1024  # of the headers of one call
# From the soft limit on, gRPC refuses calls at random; from the absolute limit on, all.
GRPC_LIMITS = {
    "grpc.max_metadata_size": MAX_METADATA_BYTES,
    "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES + 16 * 1024,
    "grpc.http2.max_ping_strikes": 0,  # any number of pings
    "grpc.keepalive_permit_without_calls": 1,
}

Handler = Callable[..., Any]  # of a gRPC method


def is_draining() -> bool:
    """Return whether Serve has begun to shut this replica down. Return False outside a replica.

    Reason: Serve tells HAProxy and the controller that a replica drains, but not the deployment's own code. The health
    service must report NOT_SERVING during that time.
    Unnecessary when: Serve calls a hook of the deployment, or sets a flag in `get_replica_context()`, at that moment.
    """
    worker = ray._private.worker.global_worker
    actor = worker.actors.get(getattr(worker, "actor_id", None))
    return bool(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False))


def http_host() -> str | None:
    """Return the host that Serve's HTTP proxy listens on, or None outside a running Serve instance.

    Reason: without API keys, a replica refuses to start when other machines can reach it.
    Unnecessary when: `serve.status()` or the replica's context contains the HTTP options.
    """
    client = serve.context._get_global_client()
    return None if client is None else client.http_config.host


def is_python_proxy(server: Any) -> bool:
    """Return whether a gRPC server of Serve belongs to its Python proxy. The other kind belongs to a replica.

    Reason: Serve registers a servicer in both kinds of server, and each needs another repair (see `grpc_repairs`).
    Unnecessary when: neither repair is needed.
    """
    return isinstance(getattr(server.service_handler_factory, "__self__", None), gRPCProxy)


def wrap_handlers(server: Any, wrappers: Mapping[str, Callable[[Handler], Handler]]) -> None:
    """Wrap the handlers that a gRPC server of Serve makes from now on.

    wrappers: the wrapper for each kind of call, "unary_unary" or "unary_stream". Other kinds stay as they are.

    Reason: Serve accepts no gRPC interceptors.
    Unnecessary when: `grpc_options` accepts interceptors.
    """
    make_handler = server.service_handler_factory

    def make(service_method: str, streaming_type: Any) -> Handler:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        wrapper = wrappers.get(streaming_type.value)
        return handler if wrapper is None else wrapper(handler)

    server.service_handler_factory = make


def set_grpc_limits() -> None:
    """Make the gRPC servers of this process accept 64 kB of metadata, and clients that often send keepalive pings.

    Serve calls it in each replica and in the Python proxy before it starts their servers, because the variable
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.

    Reason: gRPC refuses some calls with 8 kB of metadata and all with 16 kB, and closes the connection of a client
    whose pings come more often than every five minutes.
    Unnecessary when: `grpc_options` accepts options of the server.
    """
    names = {name for name, _ in DEFAULT_GRPC_SERVER_OPTIONS}
    DEFAULT_GRPC_SERVER_OPTIONS.extend((name, value) for name, value in GRPC_LIMITS.items() if name not in names)


def export_zero(counter: Counter, tags: dict[str, str]) -> None:
    """Export a counter's series with the value 0.

    Reason: `Counter.inc` refuses 0. Without a first 0, Prometheus's `rate` does not see the first increase.
    Unnecessary when: `Counter.inc(0)` is allowed.
    """
    counter._record(0, tags)
