"""One running service, asked in every way that people reach for: OpenAI's client, curl, reflection, the load test."""

import json
import subprocess
import sys
from pathlib import Path

import grpc
import openai
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from helpers.service import Service

PROMPT = "Once upon a time"
SETTINGS = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.95, "seed": 11}


def by_openai(service: Service) -> str:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, http_client=http) as client:
        return client.completions.create(model="stories-8m", prompt=PROMPT, **SETTINGS).choices[0].text


def by_curl(service: Service) -> str:
    command = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", f"{service.url}/v1/completions",
               "--json", json.dumps({"prompt": PROMPT, **SETTINGS})]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)["choices"][0]["text"]


def by_reflection(service: Service) -> str:
    """Knows an address alone: service, methods and messages are what the server says."""
    with grpc.insecure_channel(service.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        (name,) = [name for name in database.get_services() if name.startswith("tinylm.")]
        method = DescriptorPool(database).FindServiceByName(name).FindMethodByName("Generate")
        request_type, answer_type = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
        call = channel.unary_unary(f"/{name}/{method.name}", request_type.SerializeToString, answer_type.FromString)
        request = json_format.ParseDict({"prompt": PROMPT, **SETTINGS}, request_type())
        return json_format.MessageToDict(call(request, metadata=(("application", "tinylm"),)))["text"]


def test_every_client_gets_the_same_text(shared_service: Service) -> None:
    texts = {ask(shared_service) for ask in (by_openai, by_curl, by_reflection)}
    assert len(texts) == 1
    assert len(texts.pop()) > 20


@pytest.mark.parametrize("mode", [[], ["--stream"]], ids=["unary", "stream"])
def test_the_load_test_counts_every_answer_over_http(shared_service: Service, mode: list[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "loadtest", "--server", shared_service.url, "--concurrency", "3"]
    subprocess.run(
        [*command, "--duration", "1", "--warmup", "0", "-n", "8", "--output", str(output), *mode], check=True
    )
    (run,) = json.loads(output.read_text())["runs"]
    assert run["statuses"] == {"OK": run["requests"]}
    assert run["requests"] > 0
