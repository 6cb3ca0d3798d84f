"""The command line: `tinylm generate`, `write`, `batch`, `info`, `tokenize`, `explain`, `bench`, `serve`, `key`.

Commands import what they need when they run, so that `tinylm --help` and shell completion stay quick.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.status import Status
from rich.table import Table

from tinylm import __version__
from tinylm.system.paths import DEFAULT_MODEL
from tinylm.system.text_files import read_standard_input
from tinylm.terminal import shell_completion
from tinylm.terminal.output import PlainConsole, one_line_errors

if TYPE_CHECKING:
    from tinylm.batch.engine import EngineSettings
    from tinylm.batch.job import Answers
    from tinylm.bench import Report
    from tinylm.client import Client
    from tinylm.engine import Engine
    from tinylm.explain.explainer import Explainer
    from tinylm.llm import LLM
    from tinylm.stream import Stream

app = typer.Typer(
    help="TinyLM: a small language model and its CPU engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Model = Annotated[
    Path,
    typer.Option(
        "--model", "-m", help="The model directory.", metavar="DIR", autocompletion=shell_completion.model_directories
    ),
]
Kernels = Annotated[
    str,
    typer.Option(help="The kernels: numba (compiled), numpy, or auto.", autocompletion=shell_completion.kernels),
]
Precision = Annotated[
    str,
    typer.Option(help="Activations are int8, float32, or auto.", autocompletion=shell_completion.precisions),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="The most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 always takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the most likely tokens; 0 keeps all.")]
MinP = Annotated[
    float, typer.Option(help="Keep tokens with at least this share of the most likely token's probability.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, tokens of the text become less likely.")]
PresencePenalty = Annotated[float, typer.Option(help="Above 0, tokens of the answer become less likely.")]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Above 0, tokens become less likely each time that the answer holds them.")
]
BadWords = Annotated[Optional[list[str]], typer.Option(help="Never write this word; may be repeated.")]
DryMultiplier = Annotated[
    float, typer.Option(help="Above 0, tokens that extend a repetition become less likely (DRY); try 0.8.")
]
LogitBias = Annotated[
    Optional[list[str]],
    typer.Option(help="Add a number to the logit of a token; may be repeated.", metavar="TOKEN=BIAS"),
]
MinTokens = Annotated[int, typer.Option(help="Do not stop before this many tokens.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="The model does not end the text itself.")]
Stop = Annotated[Optional[list[str]], typer.Option(help="Stop before this text; may be repeated.")]
Seed = Annotated[Optional[int], typer.Option(help="The same seed gives the same text.")]
Server = Annotated[Optional[str], typer.Option("--server", "-s", help="Use a running service.", metavar="HOST:PORT")]
Tls = Annotated[
    bool, typer.Option("--tls", help="With --server: use TLS, and trust the authorities that this machine trusts.")
]
Ca = Annotated[
    Optional[Path],
    typer.Option(help="With --server: use TLS, and trust the authorities in this PEM file.", metavar="FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Run a command. Print its errors and missing packages as one line."""
    from tinylm.client import ServiceError

    with one_line_errors(ValueError, ServiceError):
        try:
            yield
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("tinylm"):
                raise
            raise ValueError(
                f"this command needs the package {error.name}: install it with pip install 'tinylm[serve]'"
            ) from None


def _loading() -> Status:
    """Show on a terminal that a model loads."""
    return PlainConsole(stderr=True).status("loading the model (the first time, this compiles the kernels)")


def _load_model(model: Path, kernels: str, precision: str) -> LLM:
    from tinylm.llm import LLM

    with _loading():
        return LLM(model, n_slots=1, kernels=kernels, precision=precision)


def _client(server: str, tls: bool, ca: Path | None, timeout_s: float = 60) -> Client:
    from tinylm.client import Client

    return Client(server, timeout_s=timeout_s, tls=ca or tls)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinylm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    dry_multiplier: DryMultiplier = 0.0,
    bad_words: BadWords = None,
    logit_bias: LogitBias = None,
    stop: Stop = None,
    stop_token_ids: Annotated[Optional[list[int]], typer.Option(help="Stop at this token; may be repeated.")] = None,
    min_tokens: MinTokens = 0,
    ignore_eos: IgnoreEos = False,
    seed: Seed = None,
    logprobs: Annotated[
        Optional[int], typer.Option(help="With --json: log-probabilities, with this many alternatives.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    kernels: Kernels = "auto",
    precision: Precision = "auto",
    server: Server = None,
    tls: Tls = False,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Continue a text. Tokens are printed while they are generated."""
    from tinylm.sampling import SamplingParams

    with _one_line_errors():
        text = read_standard_input() if prompt == "-" else prompt
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
            min_tokens=min_tokens,
            stop_token_ids=tuple(stop_token_ids or ()),
            logit_bias=dict(map(_bias, logit_bias or ())),
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            bad_words=tuple(bad_words or ()),
            dry_multiplier=dry_multiplier,
        )
        stream: Stream[Any]
        if server is not None:
            stream = _client(server, tls, ca).stream(text, params)
        else:
            stream = _load_model(model, kernels, precision).stream(text, params)
        with stream:
            if as_json:
                for _ in stream:
                    pass
                typer.echo(json.dumps({"prompt": text, **dataclasses.asdict(stream.completion)}))
                return
            _print_answer(text, stream)


def _bias(text: str) -> tuple[int, float]:
    """Return the token and the number of an option: '300=-5' -> (300, -5.0)."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ValueError(f"--logit-bias is {text!r}: it must be TOKEN=BIAS, as in 300=-5") from None


def _print_answer(prompt: str, stream: Stream[Any]) -> None:
    """Print the prompt with the first piece, so that an error has no output before it, and then the other pieces."""
    console = PlainConsole()
    for piece in stream:
        console.write(prompt, end="", style="bold")
        console.write(piece, end="")
        prompt = ""
    console.write(prompt, style="bold")


@app.command()
@app.command("chat", hidden=True)  # many users try this name first; the help says that the model does not chat
def write(
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    dry_multiplier: DryMultiplier = 0.0,
    bad_words: BadWords = None,
    stop: Stop = None,
    seed: Seed = None,
    color_probabilities: Annotated[
        bool, typer.Option("--color-probabilities", help="Colour tokens by their probability.")
    ] = False,
    history: Annotated[bool, typer.Option(help="Keep your lines in a history file.")] = True,
    model: Model = DEFAULT_MODEL,
    kernels: Kernels = "auto",
    precision: Precision = "auto",
    server: Server = None,
    tls: Tls = False,
    ca: Ca = None,
) -> None:
    """Write a story in turns: you type a line, and the model continues the story. It does not chat.

    Without a terminal, each line of standard input is a turn, and the story is printed.
    """
    from tinylm.sampling import SamplingParams
    from tinylm.terminal import lines
    from tinylm.terminal.screen import Screen
    from tinylm.terminal.source import local_source, service_source
    from tinylm.terminal.writer import Writer

    with _one_line_errors():
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            bad_words=tuple(bad_words or ()),
            dry_multiplier=dry_multiplier,
        )
        if server is not None:
            source = service_source(_client(server, tls, ca))
        else:
            source = local_source(_load_model(model, kernels, precision))
        at_a_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        typed = lines.TerminalLines(history) if at_a_terminal else lines.PipeLines()
        Writer(source, params, typed, Screen(), color_probabilities).run()


@app.command()
def batch(
    requests: Annotated[Path, typer.Argument(help="The requests: a file in the form of OpenAI's batch API.")],
    answers: Annotated[Path, typer.Argument(help="The file for the answers, in the order of the requests.")],
    model: Model = DEFAULT_MODEL,
    kernels: Kernels = "auto",
    precision: Precision = "auto",
    workers: Annotated[
        Optional[int], typer.Option(help="The most engines; the default is one for each core.", min=1)
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Use the Ray cluster of RAY_ADDRESS; without it, start Ray here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer a file of requests. The same command resumes an interrupted job."""
    with _one_line_errors():
        from tinylm.batch import job
        from tinylm.batch.engine import EngineSettings
        from tinylm.batch.progress import progress_bar

        settings = EngineSettings(model, kernels, precision)
        with progress_bar() as show:
            done = job.run(requests, answers, _answers(on_ray, settings, workers), show)
        if as_json:
            typer.echo(json.dumps({"requests": str(requests), "answers": str(answers), **done.as_dict()}))
            return
        kept = f" after {done.n_kept:,} of an earlier run" if done.n_kept else ""
        failed = f", {done.n_failed:,} of them errors" if done.n_failed else ""
        PlainConsole().write(
            f"{done.n_answered:,} answers{kept}{failed} in {answers}: {done.prompt_tokens:,} tokens of prompts and "
            f"{done.completion_tokens:,} of answers in {done.seconds:.1f} s"
        )


def _answers(on_ray: bool, settings: EngineSettings, workers: int | None) -> Answers:
    if not on_ray:
        from tinylm.batch import processes

        return partial(processes.answers, settings=settings, n_workers=workers)
    try:
        from tinylm.batch import on_ray as ray_data
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs the package {error.name}: install it with pip install 'tinylm[ray]'") from None
    return partial(ray_data.answers, settings=settings, n_workers=workers)


@app.command()
def info(
    model: Model = DEFAULT_MODEL,
    kernels: Kernels = "auto",
    precision: Precision = "auto",
    server: Server = None,
    tls: Tls = False,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Show the shape, size and arithmetic of a model or of a service's model."""
    with _one_line_errors():
        if server is None:
            facts = _model_facts(model, kernels, precision)
        else:
            with _client(server, tls, ca, timeout_s=10) as client:
                response = client.info()
            fields = {field.name: getattr(response, field.name) for field in response.DESCRIPTOR.fields}
            facts = {"server": server, **fields}
        if as_json:
            typer.echo(json.dumps(facts))
            return
        table = Table(show_header=False, box=None)
        table.add_column()
        table.add_column(overflow="fold")  # a long path is not cut off
        for name, value in facts.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        PlainConsole().print(table)


def _model_facts(directory: Path, kernels: str, precision: str) -> dict[str, Any]:
    from tinylm.llm import load

    _, loaded = load(directory, kernels, precision)
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    return {
        "model": str(directory),
        "parameters": loaded.config.n_parameters,
        **dataclasses.asdict(loaded.config),
        "weights": loaded.weight_type,
        "arithmetic": loaded.arithmetic,
        "bytes_on_disk": size,
        "version": __version__,
    }


@app.command()
def tokenize(
    text: Annotated[str, typer.Argument(help="The text; - reads it from standard input.")],
    model: Model = DEFAULT_MODEL,
    server: Server = None,
    tls: Tls = False,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Show the tokens of a text."""
    with _one_line_errors():
        text = read_standard_input() if text == "-" else text
        if server is None:
            from tinylm.llm import load

            tokenizer, _ = load(model)
            tokens = [(token, tokenizer.piece_bytes[token]) for token in tokenizer.encode(text)]
        else:
            with _client(server, tls, ca, timeout_s=10) as client:
                tokens = client.tokenize(text)
        shown = [piece.decode(errors="backslashreplace") for _, piece in tokens]
        if as_json:
            typer.echo(json.dumps({"ids": [token for token, _ in tokens], "pieces": shown}))
            return
        for (token, _), piece in zip(tokens, shown, strict=True):
            typer.echo(f"{token:6d}  {piece!r}")
        typer.echo(f"{len(tokens)} tokens", err=True)


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="The text, at most 64 tokens; - reads it from standard input.")],
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    dry_multiplier: DryMultiplier = 0.0,
    bad_words: BadWords = None,
    logit_bias: LogitBias = None,
    min_tokens: MinTokens = 0,
    ignore_eos: IgnoreEos = False,
    seed: Seed = None,
    top: Annotated[int, typer.Option(help="The most tokens to show of a distribution.")] = 10,
    model: Model = DEFAULT_MODEL,
    kernels: Kernels = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Show what the model computes for a text, and how the settings choose the next token."""
    from tinylm.explain.explainer import cache_use
    from tinylm.sampling import SamplingParams
    from tinylm.terminal import explanation

    with _one_line_errors():
        text = read_standard_input() if prompt == "-" else prompt
        params = SamplingParams(
            max_tokens=max(1, min_tokens),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            ignore_eos=ignore_eos,
            min_tokens=min_tokens,
            logit_bias=dict(map(_bias, logit_bias or ())),
            bad_words=tuple(bad_words or ()),
            dry_multiplier=dry_multiplier,
        )
        explainer, engine = _load_explainer(model, kernels, precision)
        scores = explainer.scores(text, params, explainer.ask(engine, text, params), top)
        tokens, norms, lens = explainer.tokens(text), explainer.norms(text), explainer.lens(text, top=min(top, 3))
        cache = cache_use(engine, len(tokens))
        if as_json:
            from tinylm.explain.forms import as_json as form

            parts = {"tokens": tokens, "norms": norms, "lens": lens, "scores": scores, "cache": cache}
            typer.echo(json.dumps({"prompt": text, **{name: form(part) for name, part in parts.items()}}))
            return
        console = PlainConsole()
        explanation.show_tokens(tokens, console)
        explanation.show_lens(lens, norms, console)
        explanation.show_scores(scores, top, console)
        explanation.show_summary(scores, cache, seed, console)


def _load_explainer(model: Path, kernels: str, precision: str) -> tuple[Explainer, Engine]:
    """Return the explainer of a model directory, and an engine with these kernels for the same model."""
    from tinylm.engine import Engine
    from tinylm.explain.explainer import Explainer
    from tinylm.llm import load

    with _loading():
        tokenizer, served = load(model, kernels, precision)
        return Explainer(tokenizer, load(model, "numpy", served.precision)[1]), Engine(served, n_slots=1)


@app.command()
def bench(
    batches: Annotated[str, typer.Option(help="Sequences per step.", metavar="N,N,...")] = "1,2,4,8,16,32",
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompt lengths; by default those of 16, 64 and 192 that fit.", metavar="N,N,..."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    kernels: Kernels = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Measure decoding and prompts on one core, and compare with the core's limits. Prints a line of JSON last."""
    from rich.progress import Progress

    from tinylm import bench as benchmark
    from tinylm.llm import load
    from tinylm.model import ModelRunner

    with _one_line_errors():
        sizes, lengths = _numbers("--batches", batches), _numbers("--prompts", prompts or "16,64,192")
        with _loading():
            _, loaded = load(model, kernels, precision)
            ModelRunner(loaded, n_slots=1, n_tokens=1, n_rows=1)
        if prompts is None:
            lengths = [length for length in lengths if length < loaded.config.context]
        with Progress(console=PlainConsole(stderr=True), transient=True) as progress:
            task = progress.add_task("measuring", total=len(sizes) + len(lengths))
            report = benchmark.run(loaded, sizes, lengths, lambda: progress.advance(task))
    if not as_json:
        _print_report(report)
    typer.echo(json.dumps(report.as_dict()))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be whole numbers separated by commas, got {text!r}") from None


def _print_report(report: Report) -> None:
    console = PlainConsole()
    console.print(
        f"{report.arithmetic}; the core reads {report.bandwidth_gb_per_s:.1f} GB/s "
        f"and does {report.peak_gmac_per_s:.0f} billion multiply-adds a second"
    )
    table = Table("batch", "ms a step", "tokens/s", "MB a step", "of bandwidth", "of peak")
    for row in report.decode:
        table.add_row(
            str(row.batch),
            f"{row.step_ms:.3f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.bytes_per_step / 1e6:.1f}",
            f"{row.share_of_bandwidth:.0%}",
            f"{row.share_of_peak:.0%}",
        )
    console.print(table)
    table = Table("prompt tokens", "ms to the first token", "tokens/s")
    for prompt in report.prefill:
        table.add_row(str(prompt.prompt_tokens), f"{prompt.first_token_ms:.2f}", f"{prompt.tokens_per_s:,.0f}")
    console.print(table)


@app.command()
def serve(
    config: Annotated[
        Optional[Path], typer.Option("--config", help="A Serve config; the default depends on the platform.")
    ] = None,
    wait_s: Annotated[float, typer.Option(help="Stop if the service is not ready after this many seconds.")] = 180,
) -> None:
    """Serve the model with Ray Serve until Ctrl-C. Prints a message when the service is ready."""
    with _one_line_errors():
        from tinylm.serving.ray.launch import launch

        raise typer.Exit(launch(config, wait_s))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="The name of the key's owner; the service logs it.")],
    file: Annotated[Optional[Path], typer.Option(help="Add the hash to this key file. Creates it if needed.")] = None,
    requests_per_minute: Annotated[Optional[int], typer.Option(help="The most calls in any minute.")] = None,
    tokens_per_minute: Annotated[
        Optional[int], typer.Option(help="The most tokens in any minute, of prompts and answers together.")
    ] = None,
    priority: Annotated[
        Optional[int], typer.Option(help="0 to 100; waiting requests with a higher priority run first.")
    ] = None,
) -> None:
    """Create an API key. Prints the key, and the hash for the key file (`api_keys`) of a service.

    Clients read the key from TINYLM_API_KEY. To revoke a key, remove its line. To change its limits, edit its line. The
    service notices within a second.
    """
    from tinylm.serving.keys import add_key, make_key

    fields = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "priority": priority,
    }
    with _one_line_errors():
        if file is not None:
            typer.echo(add_key(file, name, **fields))
            return
        secret, line = make_key(name, **fields)
        typer.echo(line, err=True)
        typer.echo(secret)


if __name__ == "__main__":
    app()
