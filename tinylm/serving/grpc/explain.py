"""Explanations of a short prompt, piece by piece: read an `ExplainRequest`, and return its answer."""

from __future__ import annotations

from tinylm.client.wire import PIECES, params_from_request
from tinylm.serving.calls import Call
from tinylm.serving.explanations import explain
from tinylm.serving.service import Service
from tinylm.v1 import tinylm_pb2 as pb


async def answer(service: Service, request: pb.ExplainRequest, call: Call) -> pb.ExplainResponse:
    """Return the piece that a request asks for. Raise as `explain`."""
    piece = request.WhichOneof("piece")
    if piece is None:
        raise ValueError(f"piece is not set: it must be one of {', '.join(PIECES)}")
    if piece == "batch":
        return pb.ExplainResponse(batch={"model": service.name, **await service.steps.get()})
    asked = getattr(request, piece)
    fields = {
        field.name: getattr(asked, field.name)
        for field in asked.DESCRIPTOR.fields
        if not field.has_presence or asked.HasField(field.name)
    }
    if piece == "scores":
        settings = fields.pop("settings", pb.GenerateRequest())
        if settings.prompt:
            raise ValueError("settings.prompt must be empty: prompt is a field of ExplainRequest")
        fields["params"] = params_from_request(settings)
    return pb.ExplainResponse.FromString(await explain(service, call, "message", piece, request.prompt, **fields))
