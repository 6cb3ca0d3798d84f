"""The validation of a model during training: bits per byte of held-out rows, and a story."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.tokenizer import Tokenizer

TEMPERATURE = 0.8


@torch.no_grad()
def bits_per_byte(model: nn.Module, rows: Tensor, piece_bytes: Tensor, batch_rows: int = 16) -> float:
    """Return the code length of the rows' targets divided by their UTF-8 bytes. Boundaries and padding do not count.

    rows: (N, context + 1), -1 where there is no token. piece_bytes: (vocab,) bytes of each token.
    """
    nats = n_bytes = 0.0
    for batch in rows.split(batch_rows):
        targets = batch[:, 1:]
        size = torch.where(targets >= 0, piece_bytes[targets.clamp(min=0)], 0)
        logits = model(batch[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.clamp(min=0).flatten(), reduction="none")
        nats += float((loss * (size.flatten() > 0)).sum())
        n_bytes += float(size.sum())
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def sample_story(model: nn.Module, tokenizer: Tokenizer, prompt: str, context: int, device: torch.device) -> str:
    """Return a story of up to half a context. Every call uses the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer.encode_document(prompt)
    while len(ids) < context // 2:
        logits = model(torch.tensor([ids], device=device))[0, -1].float().cpu()
        token = int(torch.multinomial(F.softmax(logits / TEMPERATURE, dim=-1), 1, generator=generator))
        if token == tokenizer.boundary_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)
