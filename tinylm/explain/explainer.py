"""Answer questions about what the model computes for a short prompt, with the reference kernels.

Questions about the same prompt share one forward pass. Layers and heads are numbered from 1, and positions from
0, the boundary in front of the prompt. Shapes: T tokens with the boundary.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from tinylm.config import ModelConfig
from tinylm.engine import Engine
from tinylm.engine.prompt import check_size
from tinylm.engine.request import mark_seen
from tinylm.engine.word_tokens import word_tokens
from tinylm.explain import filters
from tinylm.explain.engine_answer import EngineAnswer, ask, difference
from tinylm.explain.results import CacheUse, Candidate, Lens, RawScores, RoundedInput, Scores, StageReport, Token
from tinylm.kernels import numpy as kernels
from tinylm.kernels.batch import Batch
from tinylm.model import Model
from tinylm.sampling import SamplingParams
from tinylm.tokenizer import Tokenizer

MAX_TOKENS = 64  # of a prompt, without the boundary
MAX_TOP = 100  # tokens to report in a distribution
N_KEPT = 4  # prompts whose layers are kept; the longest prompt takes 8 MB
MATMULS = ("qkv", "out", "up", "down")  # of a layer, in the order of the forward pass


def read_prompt(prompt: str, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Return the token ids of a prompt, with the boundary in front. Raise ValueError if it is empty or too long."""
    check_size("prompt", prompt)
    ids = tokenizer.encode_document(prompt)
    most = min(MAX_TOKENS, config.context - 2)  # the boundary and the next token need room, too
    if not 1 <= len(ids) - 1 <= most:
        raise ValueError(f"prompt has {len(ids) - 1} tokens: it must have 1 to {most}")
    return ids


def as_tokens(ids: list[int], tokenizer: Tokenizer) -> list[Token]:
    """Return the tokens of ids."""

    def text(token: int) -> str:
        return tokenizer.piece_bytes[token].decode(errors="backslashreplace") or tokenizer.piece(token)

    return [Token(token, text(token), list(tokenizer.piece_bytes[token])) for token in ids]


def cache_use(engine: Engine, n_tokens: int) -> CacheUse:
    """Return what the keys and values of a prompt of `n_tokens`, with its boundary, take in the engine's cache."""
    slot_bytes, context = engine.cache_bytes // engine.n_slots, engine.config.context
    used = slot_bytes * n_tokens // context
    return CacheUse(engine.model.arithmetic, engine.n_slots, context, slot_bytes, n_tokens, used)


class Explainer:
    """Runs the reference kernels for one question at a time. Only one thread may use it."""

    def __init__(self, tokenizer: Tokenizer, reference: Model) -> None:
        """reference: the model with the numpy kernels. Raise ValueError for other kernels."""
        if (name := reference.kernels.describe()) != kernels.describe():
            raise ValueError(f"kernels is {name!r}: an explanation needs {kernels.describe()!r}")
        self.tokenizer, self.config = tokenizer, reference.config
        self._weights: kernels.Weights = reference.weights
        self._engine = Engine(reference, n_slots=1)  # it checks settings and draws random numbers, as for a request
        self._batch = Batch.empty(self.config, n_slots=1, n_tokens=MAX_TOKENS + 1, n_rows=1)
        self._cache = kernels.make_cache(self.config, 1, reference.precision)
        self._kept = lru_cache(N_KEPT)(self._run)

    def tokens(self, prompt: str) -> list[Token]:
        """Return the tokens of the prompt, with the boundary."""
        return as_tokens(self._ids(prompt), self.tokenizer)

    def norms(self, prompt: str) -> np.ndarray:
        """Return the length of the residual stream, (layers + 1, T): after the embedding and after each layer."""
        ids = self._ids(prompt)
        streams = [kernels.embed(self._weights, np.array(ids)), *(layer.output for layer in self.layers(prompt))]
        return np.linalg.norm(np.stack(streams), axis=-1)

    def layers(self, prompt: str) -> list[kernels.LayerRun]:
        """Return what each layer computes for the prompt. The arrays belong to the explainer."""
        return self._kept(tuple(self._ids(prompt)))

    def attention(self, prompt: str, layer: int) -> np.ndarray:
        """Return the attention of a layer's heads, (heads, T, T) float32.

        [h, i, j] is the share that token i takes from token j. Raise ValueError for a layer that the model does not
        have.
        """
        return self._shares(self._layer(prompt, layer))

    def attention_of_all(self, prompt: str) -> np.ndarray:
        """Return the attention of all heads of all layers, (layers, heads, T, T), each layer as `attention` does."""
        return np.stack([self._shares(run) for run in self.layers(prompt)])

    def head(self, prompt: str, layer: int, head: int) -> np.ndarray:
        """Return the attention of one head, (T, T), as `attention` does. Raise ValueError for an unknown head."""
        _check("head", head, 1, self.config.n_heads)
        return self.attention(prompt, layer)[head - 1]

    def lens(self, prompt: str, position: int | None = None, top: int = 5) -> Lens:
        """Return the answer after each layer. position: the token that `Lens.top` is about; None is the last one.

        Raise ValueError for a position outside of the prompt, or a `top` that is not 1 to MAX_TOP.
        """
        ids = self._ids(prompt)
        position = len(ids) - 1 if position is None else position
        _check("position", position, 0, len(ids) - 1)
        self._check_top(top)
        logits = [kernels.unembed(self._weights, layer.output) for layer in self.layers(prompt)]  # (T, vocab) each
        answers = logits[-1].argmax(axis=1)  # (T,)
        every = np.arange(len(ids))
        ranks = [1 + np.count_nonzero(of_layer > of_layer[every, answers][:, None], axis=1) for of_layer in logits]
        best = [self._candidates(of_layer[position], top) for of_layer in logits]
        return Lens(as_tokens(answers.tolist(), self.tokenizer), np.stack(ranks), position, best)

    def scores(self, prompt: str, params: SamplingParams, answer: EngineAnswer | None = None, top: int = 20) -> Scores:
        """Return the scores of the next token, and how the settings choose it.

        answer: the engine's, to compare. top: how many tokens to report of the model's own distribution, and of those
        that a stage removed. Raise ValueError for settings that the engine refuses.
        """
        ids = self._ids(prompt)
        self._check_top(top)
        request = self._engine.make_request(ids, params, words=word_tokens(params, self.tokenizer))
        logits = self.logits(prompt)
        seen, bias = np.zeros(self.config.vocab_size, bool), None
        mark_seen(seen, ids, self.config.boundary_id)
        if request.changes is not None:
            bias = np.zeros(self.config.vocab_size, np.float32)
            request.changes.begin(ids)
            request.changes.write([], bias)
        choice = filters.choose(logits, seen, bias, params)
        token = choice.greedy if params.seed is None else choice.draw(request.uniforms[0])
        return self._report(logits, choice, token, top, answer)

    def logits(self, prompt: str) -> np.ndarray:
        """Return the scores of the next token after the prompt, (vocab,) float32."""
        return kernels.unembed(self._weights, self.layers(prompt)[-1].output[-1:])[0]

    def raw_scores(self, prompt: str, top: int = 100) -> RawScores:
        """Return the scores of all tokens before all settings, and the `top` tokens with the highest scores.

        Raise ValueError for a `top` that is not 1 to MAX_TOP.
        """
        self._check_top(top)
        logits = self.logits(prompt)
        best = np.argsort(-logits, kind="stable")[:top]
        return RawScores(as_tokens(best.tolist(), self.tokenizer), logits)

    def ask(self, engine: Engine, prompt: str, params: SamplingParams) -> EngineAnswer:
        """Return the next token by an engine, for `scores` to compare. The caller alone steps the engine."""
        return ask(engine, self._ids(prompt), params, word_tokens(params, self.tokenizer))

    def matmul(self, prompt: str, layer: int, name: str, position: int | None = None) -> RoundedInput:
        """Return the input of a layer's matmul in 8 bits, and what the rounding changes.

        position: the only token to report, with its float32 input; None reports all tokens.
        Raise ValueError for a layer that the model does not have, a name that is not one of MATMULS, or a position
        outside of the prompt.
        """
        if name not in MATMULS:
            raise ValueError(f"name is {name!r}: it must be one of {', '.join(MATMULS)}")
        x = getattr(self._layer(prompt, layer), name)  # (T, in)
        if position is not None:
            _check("position", position, 0, len(x) - 1)
            x = x[position : position + 1]
        matrix = getattr(self._weights.layers[layer - 1], name)
        values, scales = kernels.round_to_int8(x)
        exact, rounded = kernels.linear(x, matrix, rounds=False), kernels.linear(x, matrix, rounds=True)
        return RoundedInput(
            values.astype(np.int8),
            scales[:, 0],
            _relative_error(values * scales, x),
            _relative_error(rounded, exact),
            None if position is None else x[0],
        )

    def _ids(self, prompt: str) -> list[int]:
        return read_prompt(prompt, self.tokenizer, self.config)

    def _run(self, ids: tuple[int, ...]) -> list[kernels.LayerRun]:
        n, batch = len(ids), self._batch
        batch.ids[:n], batch.positions[:n] = ids, np.arange(n)
        x = kernels.embed(self._weights, batch.ids[:n])  # (T, hidden)
        return list(kernels.run_layers(self._weights, self._cache, batch, n, x))

    def _shares(self, run: kernels.LayerRun) -> np.ndarray:
        """Return the attention (heads, T, T) of a layer."""
        n, heads = len(run.queries), self.config.n_heads
        # With the identity matrix as values, attention returns its own weights.
        identity = np.broadcast_to(np.eye(n, dtype=np.float32), (heads, n, n))
        return kernels.attention(run.queries, run.keys.transpose(1, 0, 2), identity).transpose(1, 0, 2)

    def _layer(self, prompt: str, layer: int) -> kernels.LayerRun:
        _check("layer", layer, 1, self.config.n_layers)
        return self.layers(prompt)[layer - 1]

    def _check_top(self, top: int) -> None:
        _check("top", top, 1, min(MAX_TOP, self.config.vocab_size))

    def _candidates(self, logits: np.ndarray, n: int) -> list[Candidate]:
        """Return the n most likely tokens by logits (vocab,), the most likely first."""
        weights = kernels.soften(logits, 1)
        best = np.argsort(-weights, kind="stable")[:n]
        shares = weights[best] / weights.sum()
        tokens = as_tokens(best.tolist(), self.tokenizer)
        return [Candidate(*pair) for pair in zip(tokens, shares.tolist(), strict=True)]

    def _report(
        self, logits: np.ndarray, choice: filters.Choice, chosen: int, top: int, answer: EngineAnswer | None
    ) -> Scores:
        """Report the tokens that matter: the most likely, the most likely of the removed, and the chosen ones."""
        shown = {*np.argsort(-logits, kind="stable")[:top].tolist(), choice.greedy, chosen}
        first = choice.stages[0]
        reports = [StageReport(first.name, first.value, first.n_kept, 0, 0.0, [])]
        for before, stage in pairwise(choice.stages):
            removed = stage.removed_from(before)
            listed = removed[:top].tolist()
            probability = float(before.probabilities[removed].sum())
            reports.append(StageReport(stage.name, stage.value, stage.n_kept, len(removed), probability, listed))
            shown.update(listed)
        ids = sorted(shown, key=lambda token: (-logits[token], token))
        greedy, taken = as_tokens([choice.greedy, chosen], self.tokenizer)
        return Scores(
            stages=reports,
            tokens=as_tokens(ids, self.tokenizer),
            logits=logits[ids],
            probabilities=np.stack([stage.probabilities[ids] for stage in choice.stages], axis=1),
            greedy=greedy,
            chosen=taken,
            difference=None if answer is None else difference(answer, logits, chosen),
        )


def _check(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless the value is a whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, {low} to {high}")


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return |actual - expected| / |expected| for each row; 0 for a row of zeros. Both are (T, n); the result (T,)."""
    lengths = np.linalg.norm(expected, axis=1)
    return np.linalg.norm(actual - expected, axis=1) / np.where(lengths > 0, lengths, 1)
