"""What the measured service says of itself."""

from __future__ import annotations

from typing import Any

import grpc

from loadtest.load import Load
from tinylm.client import CHANNEL_OPTIONS, METADATA
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

LIMIT_S = 10.0


def facts(load: Load) -> dict[str, Any] | None:
    """GetModelInfo as a dictionary; None of a server that has no such thing.

    Raises ValueError when nothing can be reached at the address, so that no sweep begins in vain.
    """
    if load.protocol != "grpc":
        return None
    options = list(CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(load.ca) if load.ca else None
    metadata = (*METADATA, *((("authorization", f"Bearer {load.api_key}"),) if load.api_key else ()))
    make = grpc.secure_channel if credentials else grpc.insecure_channel
    with make(load.server, *([credentials] if credentials else []), options=options) as channel:
        try:
            info = TinyLMStub(channel).GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata, timeout=LIMIT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return None
            reason = f"{error.code().name}: {error.details()}"
            raise ValueError(f"no TinyLM service answers at {load.server}: {reason}") from None
    return {field.name: getattr(info, field.name) for field in info.DESCRIPTOR.fields}
