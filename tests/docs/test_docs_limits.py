"""The table of limits in docs/serve.md has the values of the code and of configs/serve.yaml."""

import re
from pathlib import Path

import yaml
from ray.serve.config import HTTPOptions

from tinylm import ModelConfig, sampling
from tinylm.client.connection import MAX_API_KEY_LENGTH
from tinylm.completions import requests
from tinylm.engine.engine import MAX_OVERTAKEN
from tinylm.engine.prompt import MAX_TEXT_BYTES
from tinylm.explain import explainer
from tinylm.serving import explanations, keys
from tinylm.serving.grpc import health, methods
from tinylm.serving.http.requests import MAX_BODY_BYTES
from tinylm.serving.ray import environment, haproxy
from tinylm.serving.ray.internals import MAX_METADATA_BYTES
from tinylm.serving.service import AppArgs

# The rows whose value is no number of the code: tests of the service check most of them.
UNCHECKED = (
    "headers over HTTP, in bytes",
    "`max_tokens`",
    "explanations at once",
    "answers of a call whose client does not read",
    "keepalive pings",
    "HTTP",
    "an answer",
    "the headers of a request, also of the first of a connection",
    "a client that sends half a body, or does not read",
    "a client that has vanished without closing its connection",
    "name of a key, in characters",
    "calls and tokens of a key, per minute",
    "log of a replica",
    "services on one machine",
)


def rows() -> list[list[str]]:
    """Return the cells of each row of the table, without its head."""
    page = Path("docs/serve.md").read_text(encoding="utf-8")
    section = page.partition("\n## Limits\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_serving_page_has_the_limits_of_the_code() -> None:
    values = {row[0]: row[1].replace(",", "") for row in rows()}
    config = yaml.safe_load(Path("configs/serve.yaml").read_text(encoding="utf-8"))
    variables = config["controller_options"]["runtime_env"]["env_vars"]
    (deployment,) = config["applications"][0]["deployments"]
    args, http = AppArgs(), HTTPOptions()
    expected = {
        "headers over gRPC, in bytes": MAX_METADATA_BYTES,
        "number of headers": haproxy.MAX_HEADERS,
        "body over gRPC, in bytes": variables["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"],
        "body over HTTP, in bytes": MAX_BODY_BYTES,
        "text of a prompt, or to tokenize, in bytes": MAX_TEXT_BYTES,
        "tokens of a prompt, with the boundary in front": ModelConfig().context - 1,
        "tokens to detokenize": methods.MAX_TOKENS,
        "prompts, or tokens of all prompts, over HTTP": requests.MAX_PROMPT_ITEMS,
        "answers of a call over HTTP, to all its prompts together": requests.MAX_ANSWERS,
        "`logprobs`, `prompt_logprobs`": sampling.MAX_LOGPROBS,
        "`stop`": f"{sampling.MAX_STOP_STRINGS} strings of {sampling.MAX_STOP_CHARS} characters",
        "`bad_words`": f"{sampling.MAX_BAD_WORDS} strings of {sampling.MAX_STOP_CHARS} characters",
        "`dry_sequence_breakers`": f"{sampling.MAX_BREAKERS} strings of {sampling.MAX_BREAKER_CHARS} characters",
        "`stop_token_ids`": sampling.MAX_STOP_TOKENS,
        "`logit_bias`": f"{sampling.MAX_LOGIT_BIASES} tokens",
        "prompt of an explanation, in tokens": explainer.MAX_TOKENS,
        "`top` of an explanation": explainer.MAX_TOP,
        "connections": haproxy.MAX_CONNECTIONS,
        "calls on one connection": variables["RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS"],
        "open streams of `Health/Watch`": f"{health.MAX_WATCHING} a replica",
        "requests that a replica decodes together": args.slots,
        "requests that wait in a replica": args.max_waiting,
        "requests with a higher priority that overtake a waiting one": MAX_OVERTAKEN,
        "an explanation": f"{explanations.ANSWER_WITHIN_S:.0f} s",
        "a step of the engine": f"{args.stalled_s:.0f} s",
        "running calls when a replica stops, in a rollout too": f"{deployment['graceful_shutdown_timeout_s']} s",
        "open streams after a reload of HAProxy": f"{variables['RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S']} s",
        "an idle connection over HTTP": f"{http.keep_alive_timeout_s} s",
        "a changed key file, until the service reads it": f"{keys.LOOK_AGAIN_S:.0f} s",
        "key that TinyLM's clients send, in characters": MAX_API_KEY_LENGTH,
        "directory for Ray's sockets, in bytes of its path": environment.MAX_SOCKET_PATH - len(environment.RAY_SOCKET),
        "replicas of a service on one machine": environment.PORTS_OF_A_SERVICE,
    }
    wrong = {limit: values.get(limit) for limit, value in expected.items()
             if not re.match(rf"{re.escape(str(value))}(?!\d)", values.get(limit, ""))}  # fmt: skip
    assert wrong == {}
    assert haproxy.allowed_connections(10_439) < haproxy.MAX_CONNECTIONS == haproxy.allowed_connections(10_440)
    assert "below 10440" in values["connections"]
    assert {limit for limit in values if not limit.startswith("**")} == {*expected, *UNCHECKED}
