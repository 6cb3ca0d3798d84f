"""Fixtures of all tests: the committed model, a small random model, running services, one BLAS thread."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.kernels import quantized
from helpers.proxies import DEAD_PROXIES
from helpers.service import Service, running_service
from helpers.train import Demo, trained_demo
from hypothesis import HealthCheck, settings
from threadpoolctl import ThreadpoolController

from tinylm import LLM, ModelConfig, SamplingParams
from tinylm.llm import load
from tinylm.tokenizer import Tokenizer
from tinylm.weights import save_model

ROOT = Path(__file__).resolve().parent.parent

# No test changes these fixtures, so all examples of a property may use the same one.
settings.register_profile("tinylm", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("tinylm"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "tinylm")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as for a job in the background; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """Use one BLAS thread. More threads than free cores make small matrix products many times slower."""
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield


@pytest.fixture(scope="session", autouse=True)
def demo_under_way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future | None]:
    """Start the demo's training with the session, if a test needs it. It takes a minute and mostly waits for Ray."""
    if not any("demo" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    directory = tmp_path_factory.mktemp("demo")
    with (
        tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as ray_tmpdir,
        ThreadPoolExecutor(1) as pool,
    ):
        yield pool.submit(trained_demo, directory, Path(ray_tmpdir))


@pytest.fixture(scope="session")
def demo(demo_under_way: Future[Demo]) -> Demo:
    """Return the results of `make train-demo` with less text and fewer steps."""
    return demo_under_way.result()


@pytest.fixture(scope="session", params=["serve.yaml", "serve-python-proxy.yaml"])
def shared_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for each committed config. All tests that do not change a service share it."""
    with running_service(Path("configs") / request.param, tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the shared services last, because a running service takes memory and time from other tests.

    The monitored service comes just before them, after the end of the demo, because the agents of two Rays use the same
    port.
    """

    def rank(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return 2 if "shared_service" in names else 1 if "monitored" in names else 0

    items.sort(key=rank)


@pytest.fixture
def dead_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name proxies that do not answer, also for this machine."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in DEAD_PROXIES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def stories_dir():
    return ROOT / "models" / "stories-8m"


@pytest.fixture(scope="session")
def tokenizer(stories_dir):
    return Tokenizer(stories_dir / "tokenizer.model")


@pytest.fixture(scope="session")
def stories(stories_dir):
    """The committed model."""
    return LLM(stories_dir)


@pytest.fixture(scope="session")
def random_gpt():
    """Return a function that makes a PyTorch model in which every weight has an effect: no zeros, no norms of one."""
    import torch

    from train.core.model import GPT

    torch.set_num_threads(1)

    def make(config, seed=0):
        gpt = GPT(config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in gpt.named_parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5, generator=generator)
                elif "embed_tokens" in name:
                    parameter.normal_(0, 0.15, generator=generator)
                else:
                    parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        return gpt.eval()

    return make


@pytest.fixture(scope="session")
def tiny_config():
    return ModelConfig(hidden_size=64, n_layers=3, n_heads=2, mlp_size=128, context=64)


@pytest.fixture(scope="session")
def tiny_tensors(random_gpt, tiny_config):
    """The float32 tensors of the tiny model by name."""
    return {name: parameter.detach().numpy() for name, parameter in random_gpt(tiny_config).named_parameters()}


@pytest.fixture(scope="session")
def tiny_quantized(tiny_tensors):
    """The tensors as `save_model` stores them."""
    return quantized(tiny_tensors)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, stories_dir, tiny_config, tiny_tensors):
    """A complete model directory with random weights. Copy it before you change it."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory, tiny_config, tiny_tensors, (stories_dir / "tokenizer.model").read_bytes())
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir):
    return load(tiny_model_dir)[1]


@pytest.fixture(scope="session")
def tiny(tokenizer, tiny_model):
    """An LLM that generates every kind of token: parts of words, parts of characters."""
    return LLM.from_parts(tokenizer, tiny_model)


@pytest.fixture(scope="session")
def assert_same_greedy():
    """Check that two greedy answers have the same tokens until a tie that rounding decides."""

    def check(llm, prompt_ids, ours, theirs, tie=1e-3):
        if ours == theirs:
            return
        split = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        assert split is not None, f"one answer ends after {min(len(ours), len(theirs))} tokens, the other continues"
        scores = llm.logits([*prompt_ids, *ours[:split]])[-1]
        gap = abs(float(scores[ours[split]] - scores[theirs[split]]))
        assert gap < tie, f"token {split} is {ours[split]} or {theirs[split]}, {gap} apart: not a tie"

    return check


@pytest.fixture(scope="session")
def greedy():
    return SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="session")
def prompts():
    """Twenty prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(7)
    return [[1, *rng.integers(2, 4096, size=int(n)).tolist()] for n in rng.integers(0, 40, size=20)]
