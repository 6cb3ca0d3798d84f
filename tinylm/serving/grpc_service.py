"""The gRPC service as Serve's ingress registers it: the generated one, and what does not parse is answered properly.

gRPC itself ends a call whose message can't be parsed (a prompt that isn't UTF-8, say) with INTERNAL, which tells a
client to try again. Here it becomes `Unparsable`, which the deployment refuses with INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from ray.serve._private.proxy import gRPCProxy

from tinylm.serving.proxy_streams import hand_on_cancellations
from tinylm.serving.trailers_only import fail_by_headers_alone
from tinylm.v1 import tinylm_pb2 as pb

MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # what configs/serve.yaml sets; gRPC refuses more with RESOURCE_EXHAUSTED


@dataclass(frozen=True)
class Unparsable:
    """Stands for a request whose bytes are not a message of its type."""

    reason: str


def _tolerant(message: type[Message]) -> Callable[[bytes], Message | Unparsable]:
    def parse(data: bytes) -> Message | Unparsable:
        try:
            return message.FromString(data)
        except DecodeError as error:
            return Unparsable(f"the request is not a {message.DESCRIPTOR.full_name}: {error}")

    return parse


def add_TinyLMServicer_to_server(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`, in place of the generated function of the same name."""
    # Serve has two kinds of servers: its Python proxy's, and a replica's own, which HAProxy asks.
    if isinstance(getattr(server.service_handler_factory, "__self__", None), gRPCProxy):
        hand_on_cancellations(server)
    else:
        fail_by_headers_alone(server)
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
