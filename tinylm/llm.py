"""Text in, text out, in this process: a model directory, its tokenizer and an engine behind three methods.

Not for several threads at once; a server wants `tinylm.async_engine`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

from tinylm.completion import Completion, CompletionBuilder
from tinylm.engine import Engine
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.paths import DEFAULT_MODEL
from tinylm.sampling import SamplingParams
from tinylm.stream import Stream, Update
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TOKENIZER, ModelError, load_model


def load(directory: Path | str, kernels: str = "auto", precision: str = "auto") -> tuple[Tokenizer, Model]:
    """Load a model directory; raises ModelError naming what is missing, damaged, or does not fit together.

    kernels, precision: as `Model` takes them; ValueError when they can't be.
    """
    config, tensors = load_model(directory)
    try:
        tokenizer = Tokenizer(Path(directory) / TOKENIZER)
    except ValueError as error:
        raise ModelError(str(error)) from None
    for name, theirs, ours in (
        ("vocab_size", tokenizer.vocab_size, config.vocab_size),
        ("boundary_id", tokenizer.boundary_id, config.boundary_id),
    ):
        if theirs != ours:
            raise ModelError(f"{Path(directory) / TOKENIZER}: {name} is {theirs}, the model's config says {ours}")
    return tokenizer, Model(config, tensors, kernels, precision)


class LLM:
    """A model to generate with:

    >>> llm = LLM()
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=16, temperature=0))[0].text
    """

    def __init__(
        self,
        model: Path | str = DEFAULT_MODEL,
        n_slots: int = 16,
        threads: int = 1,
        kernels: str = "auto",
        precision: str = "auto",
    ) -> None:
        """kernels, precision: as `Model` takes them.

        threads: of NumPy's matrix library; more than 1 helps the numpy kernels with long prompts only.
        """
        self._set_up(*load(model, kernels, precision), n_slots, threads)

    @classmethod
    def from_parts(cls, tokenizer: Tokenizer, model: Model, n_slots: int = 16, threads: int = 1) -> LLM:
        """The same around a model that is in memory already."""
        llm = cls.__new__(cls)
        llm._set_up(tokenizer, model, n_slots, threads)
        return llm

    def _set_up(self, tokenizer: Tokenizer, model: Model, n_slots: int, threads: int) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.config = model.config
        self._engine = Engine(model, n_slots=n_slots, max_waiting=2**31)
        self._blas = ThreadpoolController().select(user_api="blas")
        self._threads = threads

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Answer every prompt, up to `n_slots` of them in one batch. One completion a prompt, in their order.

        Raises ValueError, before anything is generated, when a prompt is too long.
        """
        params = params or SamplingParams()
        sequences = []
        try:
            for prompt in [prompts] if isinstance(prompts, str) else prompts:
                sequences.append(self._engine.submit(self.tokenizer.encode_document(prompt), params))
            builders = [CompletionBuilder(sequence, self.tokenizer) for sequence in sequences]
            while any(builder.completion is None for builder in builders):
                self._step()
                for builder, sequence in zip(builders, sequences, strict=True):
                    builder.take()
                    if builder.completion is not None:
                        self._engine.cancel(sequence)  # a stop string may have ended the text alone
        finally:
            for sequence in sequences:
                self._engine.cancel(sequence)
        return [builder.completion for builder in builders if builder.completion is not None]

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream[Completion]:
        """Answer one prompt piece by piece; the pieces joined are the text that `generate` returns.

        Begins with the first piece asked for, and raises as `generate` does. Closing it early frees its slot.
        """
        return Stream(self._updates(prompt, params or SamplingParams()))

    def _updates(self, prompt: str, params: SamplingParams) -> Generator[Update[Completion], None, None]:
        sequence = self._engine.submit(self.tokenizer.encode_document(prompt), params)
        builder = CompletionBuilder(sequence, self.tokenizer)
        try:
            while builder.completion is None:
                self._step()
                before = builder.n_taken
                text = builder.take()
                yield text, sequence.logprobs[before : builder.n_taken], builder.completion
        finally:
            self._engine.cancel(sequence)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores of the next token after each of `ids`, (len(ids), vocab) float32, starting from nothing cached.

        Raises ValueError when there are no ids, unknown ones, or more than the context holds.
        """
        if not 1 <= len(ids) <= self.config.context:
            raise ValueError(f"ids has {len(ids)} tokens: it must have 1 to {self.config.context}")
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"ids has {array.ndim} dimensions: it must be one list of token ids")
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= self.config.vocab_size:
            raise ValueError(f"ids must be whole numbers from 0 to {self.config.vocab_size - 1}")
        with self._blas.limit(limits=self._threads):
            runner = ModelRunner(self.model, 1, len(array), len(array))
            return runner.forward(array, [Chunk(0, 0, len(array))], np.arange(len(array))).copy()

    def _step(self) -> None:
        with self._blas.limit(limits=self._threads):
            self._engine.step()
