"""The private parts of Ray that `tinylm.serving.ray.internals` uses still exist in the installed Ray."""

import ast
import asyncio
import importlib.util
import inspect
from pathlib import Path

import pytest
import ray
from ray import serve
from ray._private.worker import Worker
from ray.serve._private import grpc_util, proxy, replica
from ray.serve.context import _get_global_client
from ray.util.metrics import Counter

from tinylm.serving.ray import internals


def changed(function: str, what: str) -> str:
    return f"Ray {ray.__version__} has changed what tinylm.serving.ray.internals.{function} uses: {what}"


def test_the_installed_ray_is_the_release_that_was_read() -> None:
    assert ray.__version__.startswith(internals.READ_IN), (
        f"Ray {ray.__version__} is installed. The functions of tinylm.serving.ray.internals were read in Ray "
        f"{internals.READ_IN}: read each of them again, then change READ_IN"
    )


def test_replicas_still_have_a_shutting_down_flag() -> None:
    assert "self._shutting_down = True" in inspect.getsource(replica), changed("is_draining", "_shutting_down")
    assert "self._replica_impl" in inspect.getsource(replica), changed("is_draining", "_replica_impl")
    assert "self.actors = {}" in inspect.getsource(Worker), changed("is_draining", "global_worker.actors")


def test_outside_a_replica_nothing_is_draining() -> None:
    assert internals.is_draining() is False


def test_global_client_still_has_http_options() -> None:
    assert serve.context._get_global_client is _get_global_client, changed("http_host", "_get_global_client")
    client = importlib.util.find_spec("ray.serve._private.client")
    assert client is not None, changed("http_host", "ray.serve._private.client")
    assert client.origin is not None
    names = {
        node.name for node in ast.walk(ast.parse(Path(client.origin).read_text())) if isinstance(node, ast.FunctionDef)
    }
    assert "http_config" in names, changed("http_host", "ServeControllerClient.http_config")


def test_python_proxy_still_makes_its_own_handlers() -> None:
    assert hasattr(proxy.gRPCProxy, "service_handler_factory"), changed("is_python_proxy", "service_handler_factory")


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_wrappers_reach_the_handlers_that_serve_makes(kind: str) -> None:
    """Serve's real server class makes a handler for a generated servicer, and the wrapper gets it."""
    import grpc
    from ray.serve._private.proxy_request_response import gRPCStreamingType

    made: list[str] = []
    wrapped: list[object] = []

    def factory(service_method: str, streaming_type: gRPCStreamingType) -> object:
        made.append(service_method)
        return f"handler of {service_method}"

    def wrap(handler: object) -> object:
        wrapped.append(handler)
        return handler

    async def register() -> None:  # a server belongs to an event loop
        server = grpc_util.gRPCGenericServer(factory)
        internals.wrap_handlers(server, {kind: wrap})  # type: ignore[dict-item]
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(lambda request, context: b"")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": handler}),))

    asyncio.run(register())
    assert made, changed("wrap_handlers", "gRPCGenericServer.add_generic_rpc_handlers")
    assert wrapped == ["handler of /a.B/C"], changed("wrap_handlers", "service_handler_factory")


def test_counters_still_record_single_values() -> None:
    parameters = list(inspect.signature(Counter._record).parameters)
    assert parameters == ["self", "value", "tags"], changed("export_zero", "Counter._record")


def test_only_internals_uses_private_parts_of_ray() -> None:
    root = Path(internals.__file__).parents[3]
    found = []
    for path in sorted((root / "tinylm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(name.startswith("ray") and "._" in name for name in names) and path.name != "internals.py":
                found.append(str(path.relative_to(root)))
    assert found == []
