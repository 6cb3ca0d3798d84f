"""Register the gRPC service with Serve. `grpc_servicer_functions` in the Serve config names the function here.

It differs from the generated function in one point: what happens to a request that cannot be parsed, for example a
prompt that is not UTF-8. gRPC ends such a call with INTERNAL, and clients then retry it. Here the request becomes
`Unparsable`, and the deployment refuses it with INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from tinylm.serving.ray.grpc_repairs import fail_in_one_frame, forward_cancellations
from tinylm.serving.ray.internals import is_python_proxy
from tinylm.v1 import tinylm_pb2 as pb


class Unparsable(ValueError):
    """A request whose bytes are not a message of the expected type."""


def _tolerant(message: type[Message]) -> Callable[[bytes], Message | Unparsable]:
    def parse(data: bytes) -> Message | Unparsable:
        try:
            return message.FromString(data)
        except DecodeError as error:
            return Unparsable(f"the request is not a {message.DESCRIPTOR.full_name}: {error}")

    return parse


def add_TinyLMServicer_to_server(servicer: Any, server: Any) -> None:
    """Replace the generated function of the same name."""
    # Serve has two kinds of gRPC server: one in its Python proxy, and one in each replica, which HAProxy calls.
    if is_python_proxy(server):
        forward_cancellations(server)
    else:
        fail_in_one_frame(server)
    service = pb.DESCRIPTOR.services_by_name["TinyLM"]
    handlers = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=_tolerant(message_factory.GetMessageClass(method.input_type)),
            response_serializer=lambda message: message.SerializeToString(),
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    server.add_registered_method_handlers(service.full_name, handlers)
    _add_reflection_v1(server)


def _add_reflection_v1(server: Any) -> None:
    """Offer reflection under its present name too. Serve has only v1alpha, whose messages have the same bytes."""
    name, method = "grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"
    services = [
        pb.DESCRIPTOR.services_by_name["TinyLM"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    ]
    servicer = reflection.aio.ReflectionServicer([*services, name, reflection.SERVICE_NAME])
    handlers = {
        method: grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
    }
    server.add_passthrough_service(name)  # this server answers, and not a replica
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    server.add_registered_method_handlers(name, handlers)
