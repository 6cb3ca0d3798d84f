"""Answer lines of a batch job with one engine: lines in, answers out, in the order in which they end."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tinylm.batch.lines import answer_line, request_of
from tinylm.completions.choice import Choice
from tinylm.completions.errors import error_body, timeout_message
from tinylm.completions.requests import CompletionRequest
from tinylm.completions.response import ResponseBody
from tinylm.engine import Engine, Request
from tinylm.engine.delta import DeltaBuilder
from tinylm.engine.prompt import prompt_ids
from tinylm.engine.word_tokens import word_tokens
from tinylm.llm import load
from tinylm.sampling import SamplingParams

N_SLOTS = 32  # of an engine; more are hardly faster
PREFILL_TOKENS = 256  # prompt tokens in one step; nobody waits for the tokens of one answer


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The model of a job, and how to compute with it, as for `tinylm.llm.load`."""

    model: Path
    kernels: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer to a line of the input."""

    text: str  # the line of the output, with its end
    failed: bool = False  # the line was wrong, or its time limit passed
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False, slots=True)
class _Line:
    """A line in work."""

    number: int
    custom_id: str
    body: CompletionRequest
    response: ResponseBody
    n_left: int  # answers that are not complete; 0 once the line has ended


@dataclass(eq=False, slots=True)
class _Part:
    """One of the answers to a line."""

    line: _Line
    choice: Choice
    ids: list[int]  # the prompt
    params: SamplingParams
    builder: DeltaBuilder


class BatchEngine:
    """Answers lines as the service answers them over HTTP. Up to N_SLOTS answers share a batch."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model. Raise ValueError as `tinylm.llm.load` does."""
        self._tokenizer, model = load(settings.model, settings.kernels, settings.precision)
        self._name, self._config = settings.model.resolve().name, model.config
        self._engine = Engine(model, N_SLOTS, max_waiting=0, prefill_tokens=PREFILL_TOKENS)
        self._waiting: deque[_Part] = deque()
        self._running: dict[Request, _Part] = {}
        self._ended: list[tuple[int, LineAnswer]] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ended)

    def add(self, number: int, text: str) -> None:
        """Take a line of the input, a JSON object. `step` returns its answer with this number."""
        fields = json.loads(text)
        custom_id = fields["custom_id"]
        try:
            body = request_of(fields)
            if body.model is not None and body.model != self._name:
                message = f"model is {body.model[:256]!r}: this job has only {self._name!r}"
                self._end(number, custom_id, 404, message)
                return
            params = [body.params(index) for index in range(body.n_generated)]
            prompts = [prompt_ids(p, body.max_tokens, self._tokenizer, self._config) for p in body.prompts]
        except ValueError as error:
            self._end(number, custom_id, 400, str(error))
            return
        response = ResponseBody(body, self._name, uuid4().hex, self._tokenizer)
        line = _Line(number, custom_id, body, response, n_left=len(response.choices))
        asked = [(ids, own) for ids in prompts for own in params]
        for choice, (ids, own) in zip(response.choices, asked, strict=True):
            self._waiting.append(_Part(line, choice, ids, own, DeltaBuilder(ids, own, self._tokenizer)))

    def step(self) -> list[tuple[int, LineAnswer]]:
        """Advance the first N_SLOTS answers by one token. Return the numbers and answers of lines that have ended."""
        self._submit()
        if self._running:
            for request in self._engine.step():
                if request.finish_reason is not None or request.params.stop:
                    self._take(request, self._running[request])
        ended, self._ended = self._ended, []
        return ended

    def answer(self, lines: Sequence[str]) -> list[LineAnswer]:
        """Return the answer to each line, in the order of the lines."""
        for number, line in enumerate(lines):
            self.add(number, line)
        answers: dict[int, LineAnswer] = {}
        while self.has_work:
            answers.update(self.step())
        return [answers[number] for number in range(len(lines))]

    def _submit(self) -> None:
        """Give waiting answers to the engine while it has slots. The time limit of an answer begins here."""
        while self._waiting and len(self._running) < N_SLOTS:
            part = self._waiting.popleft()
            if not part.line.n_left:  # another answer was refused
                continue
            try:
                words = word_tokens(part.params, self._tokenizer)
                request = self._engine.submit(part.ids, part.params, part.line.body.timeout_s, words)
            except ValueError as error:
                self._refuse(part.line, str(error))
            else:
                self._running[request] = part

    def _refuse(self, line: _Line, message: str) -> None:
        line.n_left = 0
        for request in [request for request, part in self._running.items() if part.line is line]:
            self._engine.cancel(request)
            del self._running[request]
        self._end(line.number, line.custom_id, 400, message)

    def _take(self, request: Request, part: _Part) -> None:
        """Add what is new of an answer to its line."""
        delta, line = part.builder.take(request.progress()), part.line
        if delta is None:
            return
        part.choice.add(delta)
        if delta.completion is None:
            return
        self._engine.cancel(request)  # it still runs if a stop string ended the text
        del self._running[request]
        line.n_left -= 1
        if line.n_left:
            return
        if (late := line.response.timed_out) is not None:
            self._end(line.number, line.custom_id, 504, timeout_message(line.body.timeout_ms, late.n_tokens))
            return
        whole = line.response.whole()
        usage = whole["usage"]
        text = answer_line(line.custom_id, 200, whole)
        self._ended.append((line.number, LineAnswer(text, False, usage["prompt_tokens"], usage["completion_tokens"])))

    def _end(self, number: int, custom_id: str, status: int, message: str) -> None:
        """End a line with an error."""
        text = answer_line(custom_id, status, error_body(status, message))
        self._ended.append((number, LineAnswer(text, failed=True)))
