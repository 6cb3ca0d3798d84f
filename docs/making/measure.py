"""Measure what the pictures and figures of docs/how-it-works.md show, on the released model.

    python -m docs.making.measure

Writes docs/results/pictures.json. `docs.making.pictures` and `docs.making.page` use it. Times are
CPU times of one thread, so that other work on the machine matters little. Everything else is deterministic.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from threadpoolctl import ThreadpoolController

from tinylm.engine import Engine, Request
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
TEXTS = ("Once upon a time, there was a little girl.", "The astrolabe glittered.", "Ω 🐶")
PROMPT = "One day, Tom went to the"
PENALIZED = "The dog saw a big dog. The"
TEMPERATURES = (0.0, 0.5, 0.8, 1.5)
LENGTHS = (16, 32, 64, 96, 128, 160, 192, 224, 255)
ROUNDS = 9
MATRIX = "model.layers.8.mlp.up_proj.weight"


def shape(model: Model) -> dict:
    """Return the numbers of the model's shape, and where its parameters are."""
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

    def show(token: int) -> str:
        data = tokenizer.piece_bytes[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"<{data.hex()}>"

    return [show(token) if tokenizer.piece_bytes[token] else "<boundary>" for token in ids]


def tokens(tokenizer: Tokenizer) -> list[dict]:
    """Return the tokens of common and of rare texts."""
    encoded = {text: tokenizer.encode(text) for text in TEXTS}
    return [{"text": t, "bytes": len(t.encode()), "ids": i, "pieces": pieces(tokenizer, i)} for t, i in encoded.items()]


@contextmanager
def watched() -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Record each layer's attention weights, (n, heads, L), and each norm's input in the reference kernels.

    With the identity matrix as values, attention returns its own weights.
    """
    attention, rms_norm = kernels.attention, kernels.rms_norm
    attended: list[np.ndarray] = []
    normed: list[np.ndarray] = []

    def watched_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        heads, length, _ = keys.shape
        attended.append(attention(q, keys, np.broadcast_to(np.eye(length, dtype=np.float32), (heads, length, length))))
        return attention(q, keys, values)

    def watched_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        normed.append(x.copy())
        return rms_norm(x, weight, eps)

    kernels.attention, kernels.rms_norm = watched_attention, watched_norm
    try:
        yield attended, normed
    finally:
        kernels.attention, kernels.rms_norm = attention, rms_norm


def inside(tokenizer: Tokenizer, model: Model) -> dict:
    """Return attention maps of three heads, and the ranks of the answer after every layer, for one story."""
    ids = tokenizer.encode_document(STORY)
    n = len(ids)
    runner = ModelRunner(model, 1, n, n)
    with watched() as (attended, normed):
        logits = runner.forward(np.asarray(ids), [Chunk(0, 0, n)], np.arange(n)).copy()
    maps = np.stack([weights.transpose(1, 0, 2) for weights in attended])  # (layers, heads, to, from)

    later = np.arange(2, n)
    same = [(t, s) for t in later for s in range(1, t) if ids[s] == ids[t] and ids[t] != model.config.boundary_id]
    shares = {
        "the token before": maps[:, :, later, later - 1].mean(-1),
        "the first token": maps[:, :, later, 0].mean(-1),
        "what came after the same token": np.mean([maps[:, :, t, s + 1] for t, s in same if s + 1 < t], axis=0),
    }
    heads = []
    for name, share in shares.items():
        layer, head = np.unravel_index(share.argmax(), share.shape)
        heads.append(
            {
                "looks_at": name,
                "layer": int(layer) + 1,
                "head": int(head) + 1,
                "share": float(share[layer, head]),
                "weights": maps[layer, head].round(4).tolist(),
            }
        )

    # The answer after each layer: its output through the final norm and the embedding.
    chosen = logits.argmax(-1)
    w = model.weights
    ranks, guesses = [], []
    for x in normed[2::2]:  # two norms per layer: the input of the next layer's first norm, and of the final one
        scores = kernels.linear(kernels.rms_norm(x, w.norm, w.config.norm_eps), w.embedding, False)
        best = scores.argmax(-1)
        ranks.append(((scores > scores[np.arange(n), chosen][:, None]).sum(-1) + 1).tolist())
        guesses.append(pieces(tokenizer, [int(best[-1])])[0])
    return {
        "text": STORY,
        "pieces": pieces(tokenizer, ids),
        "heads": heads,
        "lens": {"ranks": ranks, "guesses": guesses, "answer": pieces(tokenizer, [int(chosen[-1])])[0]},
        "activation": rounded_activation(normed[2 * 8 + 1][-1], w.layers[8].mlp_norm, w.config.norm_eps),
    }


def rounded_activation(x: np.ndarray, norm: np.ndarray, eps: float) -> dict:
    """Return a matmul's input for the last token, before and after rounding to 8 bits."""
    before = kernels.rms_norm(x[None], norm, eps)
    values, scale = kernels.round_to_int8(before)
    error = before - values * scale
    return {
        "before": before[0].round(6).tolist(),
        "after": values[0].astype(int).tolist(),
        "scale": float(scale[0, 0]),
        "largest_error": float(np.abs(error).max()),
        "relative_error": float(np.linalg.norm(error) / np.linalg.norm(before)),
    }


def weights() -> dict:
    """Return a row of one matrix as the model directory stores it: integers and a scale."""
    matrix = load_model(MODEL)[1][MATRIX]
    assert isinstance(matrix, QuantizedMatrix)
    row = int(np.argsort(matrix.scale)[len(matrix.scale) // 2])
    largest = 127 * matrix.scale
    return {
        "matrix": MATRIX,
        "shape": list(matrix.values.shape),
        "row": row,
        "values": matrix.values[row].tolist(),
        "scale": float(matrix.scale[row]),
        "largest_of_a_row": {"least": float(largest.min()), "median": float(np.median(largest)),
                             "most": float(largest.max())},
    }  # fmt: skip


def next_token(tokenizer: Tokenizer, model: Model) -> dict:
    """Return the most likely next tokens at several temperatures, and how many top_p keeps."""
    logits = _last_logits(tokenizer, model, PROMPT)
    likeliest = np.argsort(-logits, kind="stable")[:12]
    settings = []
    for temperature in TEMPERATURES:
        unnormalized = np.exp((logits.astype(np.float64) - logits.max()) / max(temperature, kernels.LEAST_TEMPERATURE))
        kept = kernels.keep(unnormalized, 0, 0.95, 0.0)
        probabilities = unnormalized / unnormalized.sum()
        settings.append(
            {
                "temperature": temperature,
                "probabilities": probabilities[likeliest].round(5).tolist(),
                "kept_by_top_p": int(np.count_nonzero(kept)),
                "entropy_bits": float(-(probabilities * np.log2(probabilities + 1e-300)).sum()),
            }
        )
    before = _last_logits(tokenizer, model, PENALIZED)
    ids = tokenizer.encode_document(PENALIZED)
    seen = np.zeros(len(before), bool)
    seen[ids] = True
    after = kernels.penalize(before, seen, 1.3)
    dog = tokenizer.encode(" dog")[0]
    return {
        "prompt": PROMPT,
        "pieces": pieces(tokenizer, likeliest.tolist()),
        "top_p": 0.95,
        "settings": settings,
        "penalty": {"prompt": PENALIZED, "penalty": 1.3, "piece": pieces(tokenizer, [dog])[0],
                    "before": float(_softmax(before)[dog]), "after": float(_softmax(after)[dog])},
    }  # fmt: skip


def _last_logits(tokenizer: Tokenizer, model: Model, text: str) -> np.ndarray:
    ids = tokenizer.encode_document(text)
    runner = ModelRunner(model, 1, len(ids), 1)
    return runner.forward(np.asarray(ids), [Chunk(0, 0, len(ids))], np.array([-1]))[0].copy()


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return exponentials / exponentials.sum()


def cache_times(model: Model) -> dict:
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


def timeline(tokenizer: Tokenizer, model: Model) -> dict:
    """Run eight requests on four slots, and return what each step processed of each request."""
    prompts = (
        "Once upon a time",
        STORY,
        "A fox and a cat sat by the river. " * 2,
        "It was raining and",
        STORY + " ball",
        "One day",
        "A bird",
        "Tom",
    )
    arrivals = (0, 0, 3, 6, 8, 10, 18, 24)
    lengths = (24, 30, 14, 22, 12, 10, 16, 8)
    engine = Engine(model, n_slots=4, prefill_tokens=12)
    sequences: list[Request] = []
    rows: list[dict] = []
    step = 0
    while len(sequences) < len(prompts) or engine.has_work:
        while len(sequences) < len(prompts) and arrivals[len(sequences)] <= step:
            number = len(sequences)
            params = SamplingParams(max_tokens=lengths[number], seed=number)
            sequences.append(engine.submit(tokenizer.encode_document(prompts[number]), params))
            rows.append({"arrived": step, "prompt_tokens": len(sequences[-1].prompt), "steps": []})
        before = [sequence.n_cached for sequence in sequences]
        engine.step()
        for sequence, row, cached in zip(sequences, rows, before, strict=True):
            begin = max(cached, sequence.n_reused)
            if sequence.n_cached > begin:
                kind = "prompt" if begin < len(sequence.prompt) else "answer"
                row["steps"].append([step, sequence.n_cached - begin, kind])
        step += 1
    for sequence, row in zip(sequences, rows, strict=True):
        row |= {"reused": sequence.n_reused, "tokens": len(sequence.tokens), "ended": sequence.finish_reason}
    return {"slots": 4, "prefill_tokens": 12, "n_steps": step, "sequences": rows}


def computed() -> dict:
    """Return everything that does not depend on the machine."""
    tokenizer, reference = load(MODEL, "numpy", "float32")
    return {
        "shape": shape(reference),
        "tokens": tokens(tokenizer),
        "inside": inside(tokenizer, reference),
        "weights": weights(),
        "next_token": next_token(tokenizer, reference),
        "timeline": timeline(tokenizer, reference),
    }


def measured() -> dict:
    """Return the times, which depend on the machine."""
    return {"cache": cache_times(load(MODEL)[1])}


def main() -> None:
    result = {"command": "python -m docs.making.measure", "clock": "CPU time of the thread", **describe()}
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        result |= computed() | measured()
    write_file(OUT, json.dumps(result) + "\n")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
