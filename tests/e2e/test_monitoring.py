"""Metrics, dashboard and alerts of a real service under a mixed load, with a real Prometheus."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import yaml
from helpers.service import Service, running_service
from prometheus_client.parser import text_string_to_metric_families

from loadtest.bench.services import free_ports
from tinylm.client import METADATA
from tinylm.serving import metrics
from tinylm.serving.ray.monitor import DISCOVERY_FILE
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

DIRECTORY = Path("configs/monitoring")
DASHBOARD = json.loads((DIRECTORY / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = [
    rule for group in yaml.safe_load((DIRECTORY / "alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]
]
PAGE = Path("docs/operate.md").read_text(encoding="utf-8")
LIMIT_S = 60
N_REPLICAS = 2
REPORT_EVERY_S = 2
N_CANCELLED = 6
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on the PATH")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on the PATH")


def get(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as response:
        return response.read().decode()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.3)


class Snapshot:
    """TinyLM's metrics at one moment: the labels and value of each series, by name without `ray_tinylm_`."""

    def __init__(self, endpoints: list[str]) -> None:
        self.series: dict[str, list[tuple[dict[str, str], float]]] = {}
        for url in endpoints:
            lines = [line for line in get(url).splitlines() if line.startswith("ray_tinylm_")]
            for family in text_string_to_metric_families("\n".join(lines) + "\n"):
                for sample in family.samples:
                    name = sample.name.removeprefix("ray_tinylm_")
                    self.series.setdefault(name, []).append((sample.labels, sample.value))

    def total(self, name: str, **labels: str) -> float:
        return sum(value for own, value in self.series.get(name, []) if labels.items() <= own.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sum for each value of the label, without zeros."""
        sums: Counter[str] = Counter()
        for labels, value in self.series.get(name, []):
            sums[labels[label]] += value
        return {value: count for value, count in sums.items() if count}


@dataclass(frozen=True)
class Monitored:
    """A service of two replicas with two slots each, and its Prometheus."""

    service: Service
    haproxy_port: int
    prometheus: str | None = None

    def is_complete(self) -> bool:
        """Return whether both replicas export metrics, and HAProxy has both and the fallback proxy.

        HAProxy's counters begin again with each config.
        """
        try:
            return len(self.snapshot().series.get("requests_total", [])) == N_REPLICAS and (
                f'{{proxy="grpc-tinylm",state="UP"}} {N_REPLICAS + 1}\n' in self.haproxy()
            )
        except (OSError, ValueError):  # Ray lists an endpoint a moment before it listens there
            return False

    def haproxy(self) -> str:
        return get(f"http://127.0.0.1:{self.haproxy_port}/metrics")

    def denied(self) -> int:
        """Return how many calls HAProxy itself has refused."""
        (count,) = re.findall(r'haproxy_backend_requests_denied_total\{proxy="grpc-tinylm"\} (\d+)', self.haproxy())
        return int(count)

    def snapshot(self) -> Snapshot:
        (group,) = json.loads((self.service.ray_tmpdir / "ray" / DISCOVERY_FILE).read_text())
        return Snapshot([f"http://{target}/metrics" for target in group["targets"]])

    def query(self, expression: str) -> list[dict]:
        query = urllib.parse.urlencode({"query": expression})
        answer = json.loads(get(f"{self.prometheus}/api/v1/query?{query}"))
        assert answer["status"] == "success"
        return answer["data"]["result"]


@contextmanager
def running_prometheus(service: Service, haproxy_port: int, directory: Path) -> Iterator[str]:
    """Run `tinylm.serving.ray.monitor` with shorter intervals than the committed ones, and yield Prometheus's URL."""
    configs = directory / "monitoring"
    shutil.copytree(DIRECTORY, configs)
    text = (configs / "prometheus.yml").read_text()
    assert "127.0.0.1:9101" in text
    text = text.replace("10s", f"{REPORT_EVERY_S}s").replace("127.0.0.1:9101", f"127.0.0.1:{haproxy_port}")
    (configs / "prometheus.yml").write_text(text)
    (port,) = free_ports(1)
    command = ["-m", "tinylm.serving.ray.monitor", "--config", str(configs / "prometheus.yml")]
    command += ["--data", str(directory / "data"), "--prometheus-port", str(port)]
    environment = {**os.environ, "RAY_TMPDIR": str(service.ray_tmpdir), "PYTHONUNBUFFERED": "1"}
    log = directory / "monitor"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until(lambda: "/alerts" in log.read_text() or process.poll() is not None, "Prometheus has started")
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    directory = tmp_path_factory.mktemp("monitored")
    values = yaml.safe_load(Path("configs/serve.yaml").read_text())
    values["applications"][0]["args"] |= {"slots": 2, "max_waiting": 2}
    values["applications"][0]["deployments"][0]["num_replicas"] = N_REPLICAS
    config = directory / "monitored.yaml"
    config.write_text(yaml.safe_dump(values))
    interval = {"RAY_metrics_report_interval_ms": str(REPORT_EVERY_S * 1000)}  # 10 s by default
    with running_service(config, directory, **interval) as service, ExitStack() as stack:
        variables = yaml.safe_load(service.config.read_text())["controller_options"]["runtime_env"]["env_vars"]
        monitored = Monitored(service, int(variables["RAY_SERVE_HAPROXY_METRICS_PORT"]))
        if shutil.which("prometheus"):
            url = stack.enter_context(running_prometheus(service, monitored.haproxy_port, directory))
            monitored = replace(monitored, prometheus=url)
        wait_until(monitored.is_complete, "two replicas")
        if monitored.prometheus:  # `rate` ignores what a series has at Prometheus's first look
            wait_until(lambda: len(monitored.query("ray_tinylm_requests_total")) == N_REPLICAS, "two replicas scraped")
        yield monitored


@dataclass
class Load:
    """What the clients of a mixed load saw."""

    sent: int
    denied: int  # refused by HAProxy: all others reached a replica
    endings: Counter[str]  # finish reasons and names of statuses
    tokens: Counter[str]  # of answers, by finish reason
    prompt_tokens: Counter[str]


def ask(stub: TinyLMStub, request: pb.GenerateRequest, stream: bool) -> tuple[str, str, int, int]:
    """Return finish reason, status, tokens and prompt tokens, as far as the client learns them."""
    try:
        if stream:
            answer = list(stub.GenerateStream(request, metadata=METADATA))[-1]
        else:
            answer = stub.Generate(request, metadata=METADATA)
    except grpc.RpcError as error:
        tokens = re.search(r"after (\d+) tokens", error.details())
        return "timeout" if tokens else "", error.code().name, int(tokens[1]) if tokens else 0, 0
    reason = pb.FinishReason.Name(answer.finish_reason).removeprefix("FINISH_REASON_").lower()
    return reason, "OK", answer.usage.completion_tokens, answer.usage.prompt_tokens


@pytest.fixture(scope="module")
def load(monitored: Monitored) -> Load:
    """Twelve callers of two replicas, which hold four requests each: answers, refusals, timeouts, invalid requests."""
    requests = [
        {"max_tokens": 100},
        {"max_tokens": 40, "stop": ["."], "seed": 1, "temperature": 0.0},
        {"max_tokens": 250, "timeout_ms": 20},
        {"max_tokens": 8},
        {"max_tokens": 8, "top_p": 2.0},
    ]

    def call(number: int) -> tuple[str, str, int, int]:
        request = pb.GenerateRequest(prompt="Once upon a time", **requests[number % len(requests)])
        return ask(stubs[number % len(stubs)], request, stream=number % 2 == 0)

    channels = [grpc.insecure_channel(monitored.service.address) for _ in range(12)]
    stubs = [TinyLMStub(channel) for channel in channels]
    with ThreadPoolExecutor(len(channels)) as pool:
        seen = list(pool.map(call, range(300)))
    stubs[0].Tokenize(pb.TokenizeRequest(text="Once"), metadata=METADATA)  # the metrics do not count this call
    stubs[0].GetModelInfo(pb.GetModelInfoRequest(), metadata=METADATA)
    for channel in channels:
        channel.close()
    tokens: Counter[str] = Counter()
    prompt_tokens: Counter[str] = Counter()
    for reason, _, n_tokens, n_prompt_tokens in seen:
        tokens[reason] += n_tokens
        prompt_tokens[reason] += n_prompt_tokens
    endings = Counter(reason or status for reason, status, _, _ in seen)
    assert {"length", "stop", "timeout", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"} <= set(endings)
    denied = monitored.denied()
    wait_until(lambda: monitored.snapshot().total("requests_total") >= len(seen) - denied, "all requests exported")
    return Load(len(seen), denied, endings, tokens, prompt_tokens)


@pytest.fixture(scope="module")
def counted(monitored: Monitored, load: Load) -> Snapshot:
    return monitored.snapshot()


def test_exactly_the_defined_metrics_are_exported(counted: Snapshot) -> None:
    names = set()
    for metric in metrics.METRICS:
        parts = ["_bucket", "_sum", "_count"] if metric.kind == "histogram" else [""]
        names |= {metric.exported + part for part in parts}
    assert {f"ray_tinylm_{name}" for name in counted.series} == names


def test_series_exist_before_their_first_count(counted: Snapshot) -> None:
    """Otherwise `rate`, and an alert, would miss the first error. The load has no UNAVAILABLE."""
    for metric in metrics.METRICS:
        if metric.kind == "counter" and metric.label:
            series = counted.series[metric.exported.removeprefix("ray_tinylm_")]
            assert sorted(labels[metric.label] for labels, _ in series) == sorted(metric.values * N_REPLICAS)
    assert counted.total("requests_refused_total", code="UNAVAILABLE") == 0


def test_requests_are_counted_by_their_ending(counted: Snapshot, load: Load) -> None:
    assert counted.total("requests_total") == load.sent - load.denied
    refused = Counter({name: n for name, n in load.endings.items() if name.isupper()})
    assert load.denied > 0
    assert counted.by("requests_refused_total", "code") == refused - Counter(RESOURCE_EXHAUSTED=load.denied)
    finished = {name: n for name, n in load.endings.items() if name.islower()}
    assert counted.by("request_success_total", "finished_reason") == finished
    assert counted.total("requests_cancelled_total") == 0


def test_tokens_equal_the_usage_of_the_answers(counted: Snapshot, load: Load) -> None:
    assert counted.by("generation_tokens_total", "finished_reason") == {k: n for k, n in load.tokens.items() if n}
    read = counted.by("prompt_tokens_total", "finished_reason")
    assert {reason: read[reason] for reason in ("length", "stop")} == {
        reason: load.prompt_tokens[reason] for reason in ("length", "stop")
    }
    assert read["timeout"] >= load.prompt_tokens["timeout"]  # a unary call that times out has no usage


def test_histograms_have_one_value_per_request_or_token(counted: Snapshot, load: Load) -> None:
    n_answers = sum(n for name, n in load.endings.items() if name.islower())
    assert counted.total("e2e_request_latency_seconds_count") == n_answers
    assert counted.total("request_queue_time_seconds_count") == n_answers
    n_first = counted.total("time_to_first_token_seconds_count")
    assert load.endings["length"] + load.endings["stop"] <= n_first <= n_answers
    # The engine can generate tokens after a stop string, up to the limit of 40.
    drawn = counted.total("inter_token_latency_seconds_count") + n_first
    assert 0 <= drawn - sum(load.tokens.values()) <= 40 * load.endings["stop"] - load.tokens["stop"]
    for metric in metrics.METRICS:
        if metric.kind == "histogram":
            name = metric.exported.removeprefix("ray_tinylm_")
            assert counted.total(f"{name}_bucket", le="+Inf") == counted.total(f"{name}_count")
            assert counted.total(f"{name}_sum") > 0
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert [value for _, value in counted.series[gauge]] == [0] * N_REPLICAS


def test_cancelled_requests_are_counted_with_their_tokens(monitored: Monitored, counted: Snapshot) -> None:
    with grpc.insecure_channel(monitored.service.address) as channel:
        stub = TinyLMStub(channel)
        for _ in range(N_CANCELLED):
            stream = stub.GenerateStream(pb.GenerateRequest(prompt="Once", max_tokens=250), metadata=METADATA)
            next(stream)
            stream.cancel()

    def more(name: str) -> float:
        return now.total(name) - counted.total(name)

    def ended() -> bool:
        nonlocal now
        now = monitored.snapshot()
        return more("request_success_total") + now.total("requests_cancelled_total") >= N_CANCELLED

    now = counted
    wait_until(ended, "all calls counted by how they ended")
    n_cancelled = now.total("requests_cancelled_total")
    assert more("requests_total") == more("request_success_total") + n_cancelled == N_CANCELLED
    assert n_cancelled > 0
    assert n_cancelled <= now.total("generation_tokens_total", finished_reason="cancelled") < 250 * n_cancelled


def queries() -> list[tuple[str, str]]:
    """Return the title and the query of each panel's targets."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


@needs_prometheus
def test_every_query_of_the_dashboard_has_a_result(monitored: Monitored, load: Load) -> None:
    assert len(queries()) > 30
    pending = dict.fromkeys((title, query.replace("$__rate_interval", "5m")) for title, query in queries())

    def answered() -> bool:
        for title, query in list(pending):
            values = [float(series["value"][1]) for series in monitored.query(query)]
            if values and all(map(math.isfinite, values)):
                del pending[title, query]
        return not pending

    deadline = time.monotonic() + LIMIT_S
    while not answered() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not pending


@needs_prometheus
def test_prometheus_reaches_all_endpoints(monitored: Monitored, load: Load) -> None:
    (result,) = monitored.query("sum(ray_tinylm_requests_total)")
    assert float(result["value"][1]) >= load.sent - load.denied
    targets = json.loads(get(f"{monitored.prometheus}/api/v1/targets"))["data"]["activeTargets"]
    assert {target["labels"]["job"] for target in targets} == {"ray", "haproxy"}
    assert [target["scrapeUrl"] for target in targets if target["health"] != "up"] == []


@needs_prometheus
def test_prometheus_evaluates_every_alert(monitored: Monitored) -> None:
    def rules() -> dict[str, dict]:
        groups = json.loads(get(f"{monitored.prometheus}/api/v1/rules"))["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules().values()), "all rules evaluated")
    assert set(rules()) == {alert["alert"] for alert in ALERTS}
    for name in ("TinyLMNoMetrics", "TinyLMReplicaDown", "TinyLMReplicasRestart", "TinyLMErrors"):
        assert rules()[name]["state"] == "inactive"
    for alert in ALERTS:
        for name in re.findall(r"(?:ray|haproxy)_\w+", alert["expr"]):
            assert monitored.query(name), f"{alert['alert']} uses {name}, which is not exported"


@needs_promtool
def test_the_alerts_pass_promtool_s_tests() -> None:
    for command in ("check rules alerts.yml", "check config prometheus.yml", "test rules alerts_test.yml"):
        result = subprocess.run(["promtool", *command.split()], cwd=DIRECTORY, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    tested = yaml.safe_load((DIRECTORY / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    expected = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert expected == {alert["alert"] for alert in ALERTS}


def test_every_alert_has_a_section_in_the_docs() -> None:
    sections = re.findall(r"^### (TinyLM\w+)$", PAGE, re.MULTILINE)
    assert sections == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"docs/operate.md#{alert['alert'].lower()}"


def test_a_missing_prometheus_is_an_error_that_helps() -> None:
    command = [sys.executable, "-m", "tinylm.serving.ray.monitor"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": "/nonexistent"})
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "apt-get install prometheus" in result.stderr
