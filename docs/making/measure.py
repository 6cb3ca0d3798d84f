"""Measure on the released model what the pictures and figures of docs/how-it-works.md show.

    python -m docs.making.measure

Writes docs/results/pictures.json, which `docs.making.pictures` and `docs.making.page` read. Times are CPU times of one
thread, so other programs have little influence. Everything else is deterministic. `docs.making.training` measures what
the page shows of training.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.special import softmax
from threadpoolctl import ThreadpoolController

from docs.making.training import training
from tinylm.engine import Engine, Request
from tinylm.explain.explainer import Explainer
from tinylm.kernels import numpy as kernels
from tinylm.llm import load
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.sampling import SamplingParams
from tinylm.system.files import write_file
from tinylm.system.machine import describe
from tinylm.tokenizer import Tokenizer
from tinylm.weights import QuantizedMatrix, load_model

MODEL = Path("models/stories-8m")
OUT = Path("docs/results/pictures.json")
STORY = "Lily had a little dog named Max. Max liked to run in the park. One day, Lily lost her red ball. Max found the"
ANSWER = " ball"
TEXTS = (STORY, "The astrolabe glittered.", "Ω 🐶")
PENALTY = 1.3
TEMPERATURES = (0.0, 0.5, 0.8, 1.5)
TOP_P = 0.95
LENGTHS = (16, 32, 64, 96, 128, 160, 192, 224, 255)
ROUNDS = 9
LAYER = 8
MATRIX = f"model.layers.{LAYER}.mlp.up_proj.weight"
SLOTS, PREFILL_TOKENS = 4, 12
REQUESTS = (  # (prompt, step of arrival, tokens of the answer)
    ("Once upon a time", 0, 24),
    (STORY, 0, 30),
    ("A fox and a cat sat by the river. " * 2, 3, 14),
    ("It was raining and", 6, 22),
    (STORY + ANSWER, 8, 12),
    ("One day", 10, 10),
    ("A bird", 18, 16),
    ("Tom", 24, 8),
)


def shape(model: Model) -> dict[str, Any]:
    """Return the numbers of the model's shape, and the number of parameters of each part."""
    c = model.config
    return {
        "parameters": c.n_parameters,
        "embedding": c.vocab_size * c.hidden_size,
        "attention": c.n_layers * 4 * c.hidden_size**2,
        "mlp": c.n_layers * 2 * c.hidden_size * c.mlp_size,
        "norms": (2 * c.n_layers + 1) * c.hidden_size,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "layers": c.n_layers,
        "heads": c.n_heads,
        "head_dim": c.head_dim,
        "mlp_size": c.mlp_size,
        "context": c.context,
        "radians_a_token": [c.rope_theta ** (-i / c.head_dim) for i in range(0, c.head_dim, 2)],
    }


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return each token's text, or its bytes in hexadecimal if they are part of a character."""

    def shown(data: bytes) -> str:
        try:
            return data.decode() or "<boundary>"
        except UnicodeDecodeError:
            return f"<{data.hex()}>"

    return [shown(tokenizer.piece_bytes[token]) for token in ids]


def tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the tokens of common and of rare texts."""
    encoded = {text: tokenizer.encode(text) for text in TEXTS}
    return [{"text": t, "bytes": len(t.encode()), "ids": i, "pieces": pieces(tokenizer, i)} for t, i in encoded.items()]


def inside(explainer: Explainer) -> dict[str, Any]:
    """Return attention maps of three heads, the rank of the answer after every layer, and vectors, for the story."""
    ids = [token.id for token in explainer.tokens(STORY)]
    layers = range(1, explainer.config.n_layers + 1)
    maps = np.stack([explainer.attention(STORY, layer) for layer in layers])  # (layers, heads, to, from)
    lens = explainer.lens(STORY)
    answer = pieces(explainer.tokenizer, [lens.answers[-1].id])[0]
    return {
        "text": STORY,
        "pieces": pieces(explainer.tokenizer, ids),
        "heads": heads(maps, ids),
        "lens": {"ranks": lens.ranks.tolist(), "answer": answer},
        "norms": explainer.norms(STORY)[:, -1].tolist(),
        "activation": rounded_activation(next(islice(explainer.layers(STORY), LAYER, None)).up[-1:]),
    }


def heads(maps: np.ndarray, ids: list[int]) -> list[dict[str, Any]]:
    """Return the head with the largest share of attention for each of three targets.

    maps: attention weights, (layers, heads, to, from).
    """
    later = np.arange(2, len(ids))
    same = [(t, s) for t in later for s in range(1, t - 1) if ids[s] == ids[t]]
    shares = {
        "the token before": maps[:, :, later, later - 1].mean(-1),
        "the first token": maps[:, :, later, 0].mean(-1),
        "what came after the same token": np.mean([maps[:, :, t, s + 1] for t, s in same], axis=0),
    }
    found = []
    for name, share in shares.items():
        layer, head = np.unravel_index(share.argmax(), share.shape)
        found.append(
            {
                "looks_at": name,
                "layer": int(layer) + 1,
                "head": int(head) + 1,
                "share": float(share[layer, head]),
                "weights": maps[layer, head].round(4).tolist(),
            }
        )
    return found


def rounded_activation(before: np.ndarray) -> dict[str, Any]:
    """Return a matmul's input for one token, (1, hidden), before and after rounding to 8 bits."""
    values, scale = kernels.round_to_int8(before)
    return {
        "before": before[0].round(6).tolist(),
        "after": values[0].astype(int).tolist(),
        "scale": float(scale[0, 0]),
        "relative_error": float(np.linalg.norm(before - values * scale) / np.linalg.norm(before)),
    }


def weights() -> dict[str, Any]:
    """Return a row of one matrix as the model directory stores it: integers and a scale."""
    matrix = load_model(MODEL)[1][MATRIX]
    assert isinstance(matrix, QuantizedMatrix)
    row = int(np.argsort(matrix.scale)[len(matrix.scale) // 2])
    largest = 127 * matrix.scale
    return {
        "matrix": MATRIX,
        "row": row,
        "values": matrix.values[row].tolist(),
        "scale": float(matrix.scale[row]),
        "largest_of_a_row": {"least": float(largest.min()), "most": float(largest.max())},
    }


def next_token(explainer: Explainer) -> dict[str, Any]:
    """Return the most likely next tokens at several temperatures, and the number that top_p keeps."""
    logits = explainer.logits(STORY)
    likeliest = np.argsort(-logits, kind="stable")[:12]
    settings = []
    for temperature in TEMPERATURES:
        unnormalized = kernels.soften(logits, temperature)
        kept = kernels.keep(unnormalized, 0, TOP_P, 0.0)
        probabilities = unnormalized / unnormalized.sum()
        settings.append(
            {
                "temperature": temperature,
                "probabilities": probabilities[likeliest].round(5).tolist(),
                "kept_by_top_p": int(np.count_nonzero(kept)),
            }
        )
    return {
        "pieces": pieces(explainer.tokenizer, likeliest.tolist()),
        "logits": logits[likeliest].tolist(),
        "probabilities": softmax(logits.astype(np.float64))[likeliest].tolist(),
        "top_p": TOP_P,
        "settings": settings,
        "penalty": {"penalty": PENALTY, "probability": penalized(explainer, logits)},
    }


def penalized(explainer: Explainer, logits: np.ndarray) -> float:
    """Return the probability of the answer, which the story holds already, with a repetition penalty."""
    seen = np.zeros(len(logits), bool)
    seen[[token.id for token in explainer.tokens(STORY)]] = True
    return probability(explainer, kernels.penalize(logits, seen, PENALTY))


def probability(explainer: Explainer, logits: np.ndarray) -> float:
    """Return the probability of the answer by logits (vocab,)."""
    (answer,) = explainer.tokenizer.encode(ANSWER)
    return float(softmax(logits.astype(np.float64))[answer])


def precisions(reference: Explainer) -> dict[str, float]:
    """Return the probability of the answer with both precisions."""
    explainers = {"float32": reference, "int8": Explainer(*load(MODEL, "numpy", "int8"))}
    return {name: probability(explainer, explainer.logits(STORY)) for name, explainer in explainers.items()}


def losses(explainer: Explainer, weights: kernels.Weights) -> dict[str, Any]:
    """Return the probability of each token of the story with its answer, after the tokens before it."""
    text = STORY + ANSWER
    ids = [token.id for token in explainer.tokens(text)]
    *_, last = explainer.layers(text)
    every = softmax(kernels.unembed(weights, last.output).astype(np.float64), axis=-1)  # (T, vocab)
    probabilities = every[np.arange(len(ids) - 1), ids[1:]]
    return {
        "pieces": pieces(explainer.tokenizer, ids[1:]),
        "probabilities": probabilities.round(6).tolist(),
        "mean": float(-np.log(probabilities).mean()),
    }


def cache_times(model: Model) -> dict[str, Any]:
    """Return the CPU time in ms of the next token by text length, with and without the cache."""
    context = model.config.context
    runner = ModelRunner(model, 1, context, 1)
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, context)
    last = np.array([-1])
    runner.forward(ids, [Chunk(0, 0, context)], last)

    def milliseconds(length: int, start: int) -> float:
        times = []
        for _ in range(ROUNDS):
            begin = time.thread_time()
            runner.forward(ids[start:length], [Chunk(0, start, length - start)], last)
            times.append((time.thread_time() - begin) * 1e3)
        return round(median(times), 4)

    return {
        "arithmetic": model.arithmetic,
        "lengths": list(LENGTHS),
        "with_ms": [milliseconds(length, length - 1) for length in LENGTHS],
        "without_ms": [milliseconds(length, 0) for length in LENGTHS],
        "bytes_a_token": runner.cache_bytes // context,
    }


def timeline(tokenizer: Tokenizer, model: Model) -> dict[str, Any]:
    """Run REQUESTS on a few slots, and return the tokens that each step processed of each request."""
    engine = Engine(model, n_slots=SLOTS, prefill_tokens=PREFILL_TOKENS)
    requests: list[Request] = []
    rows: list[dict[str, Any]] = []
    step = 0
    while len(requests) < len(REQUESTS) or engine.has_work:
        for seed, (prompt, arrival, max_tokens) in enumerate(REQUESTS):
            if arrival == step:
                ids = tokenizer.encode_document(prompt)
                requests.append(engine.submit(ids, SamplingParams(max_tokens=max_tokens, seed=seed)))
                rows.append({"arrived": step, "prompt_tokens": len(ids), "steps": []})
        before = [request.n_cached for request in requests]
        engine.step()
        for request, row, cached in zip(requests, rows, before, strict=True):
            begin = max(cached, request.n_reused)
            if request.n_cached > begin:
                kind = "prompt" if begin < len(request.prompt) else "answer"
                row["steps"].append([step, request.n_cached - begin, kind])
        step += 1
    for request, row in zip(requests, rows, strict=True):
        row["reused"] = request.n_reused
    return {"slots": SLOTS, "prefill_tokens": PREFILL_TOKENS, "n_steps": step, "sequences": rows}


def computed() -> dict[str, Any]:
    """Return everything that does not depend on the machine."""
    tokenizer, reference = load(MODEL, "numpy", "float32")
    explainer = Explainer(tokenizer, reference)
    return {
        "shape": shape(reference),
        "tokens": tokens(tokenizer),
        "inside": inside(explainer),
        "weights": weights(),
        "next_token": next_token(explainer),
        "precisions": precisions(explainer),
        "losses": losses(explainer, reference.weights),
        "timeline": timeline(tokenizer, reference),
    }


def main() -> None:
    result = {"command": "python -m docs.making.measure", "clock": "CPU time of the thread", **describe()}
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        result |= {**computed(), "cache": cache_times(load(MODEL)[1]), "training": training(STORY + ANSWER)}
    write_file(OUT, json.dumps(result) + "\n")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
