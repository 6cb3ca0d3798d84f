"""llama.cpp through the low-level interface of llama-cpp-python: one `llama_decode` for all sequences, own samplers.

Its weights are Q8_0 or Q4_0 throughout, the embedding included. Its activation relu(x)^2 is cheaper than GELU, which
favours it. The vocabulary has no texts, since the comparison exchanges token ids only.

Compile it with -march=native throughout, as `make peers` does. GGML_NATIVE alone is not enough: with GCC 12
some of its kernels return without `vzeroupper`, and samplers compiled for plain x86-64 then take ten times as long.
Samplers in the graph, a float32 cache, and different types for keys and values were slower. Its AMX kernels end the
process with this model, so it must be compiled without them.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np

from loadtest.bench.peers.gguf_file import write_gguf
from loadtest.bench.peers.model import float32_tensors
from loadtest.bench.peers.runner import TEMPERATURE, TOP_P, Case, Settings

BATCH_TOKENS = 2048  # at most in one call
SYSTEM = llama.llama_print_system_info().decode().strip(" |")
KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _silence(level: int, text: bytes, data: Any) -> None:
    pass


@cache
def _model(directory: Path, kind: str, repack: bool) -> Any:
    if "AMX_INT8 = 1" in SYSTEM:
        raise RuntimeError("llama.cpp has AMX kernels, which end the process: compile it as `make peers` does")
    llama.llama_log_set(_silence, None)
    llama.llama_backend_init()
    path = directory.with_name(f"{directory.name}.{kind}.gguf")
    if not path.exists():
        write_gguf(path, *float32_tensors(directory), gguf.GGMLQuantizationType[kind])
    params = llama.llama_model_default_params()
    params.use_extra_bufts = repack
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return model


class _Batch:
    """llama.cpp's batch of tokens, on NumPy arrays."""

    def __init__(self) -> None:
        self.ids, self.positions, self.sequences, self._counts = (np.zeros(BATCH_TOKENS, np.int32) for _ in range(4))
        self._wanted = np.zeros(BATCH_TOKENS, np.int8)
        self._counts[:] = 1
        self._pointers = self.sequences.ctypes.data + 4 * np.arange(BATCH_TOKENS, dtype=np.uintp)
        self.struct = llama.llama_batch()
        for field, array, kind in (
            ("token", self.ids, ctypes.c_int32),
            ("pos", self.positions, ctypes.c_int32),
            ("n_seq_id", self._counts, ctypes.c_int32),
            ("seq_id", self._pointers, ctypes.POINTER(ctypes.c_int32)),
            ("logits", self._wanted, ctypes.c_int8),
        ):
            setattr(self.struct, field, array.ctypes.data_as(ctypes.POINTER(kind)))

    def fill(self, prompts: np.ndarray) -> None:
        """Fill in prompts (B, T), and ask for the logits after the last token of each."""
        n, length = prompts.shape
        self.struct.n_tokens = n * length
        self.ids[: n * length] = prompts.reshape(-1)
        self.positions[: n * length] = np.tile(np.arange(length), n)
        self.sequences[: n * length] = np.repeat(np.arange(n), length)
        self._wanted[: n * length] = np.tile(np.arange(length) == length - 1, n)

    def begin_decode(self, n: int, position: int) -> None:
        """Prepare steps of one token a sequence, for n sequences. The first token is at `position`."""
        self.struct.n_tokens = n
        self.positions[:n], self.sequences[:n], self._wanted[:n] = position, np.arange(n), 1


class LlamaQ8:
    version = f"llama-cpp-python {llama.__version__}, {SYSTEM}"
    kind = "Q8_0"
    repacks = False  # whether it has kernels for tiles of weights of this kind

    def __init__(
        self,
        directory: Path,
        batch: int,
        flash_attention: bool,
        kv: str,
        kv_unified: bool = False,
        n_ubatch: int = 512,
        repack: bool = True,
    ) -> None:
        """kv: the type of keys and values; q8_0 needs flash attention. repack: put weights into tiles."""
        self._model = _model(directory, self.kind, repack)
        config, _ = float32_tensors(directory)
        self._vocab_size, self._n_sequences = config.vocab_size, batch
        params = llama.llama_context_default_params()
        params.n_ctx = config.context * batch
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH_TOKENS, n_ubatch, batch
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = KV_TYPES[kv]
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.kv_unified, params.no_perf = kv_unified, True
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context with these settings")
        self._batch = _Batch()
        self._samplers = [_sampler(seed) for seed in range(batch)]

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        attention = [
            {"flash_attention": True, "kv": "f16"},
            {"flash_attention": True, "kv": "q8_0"},
            {"flash_attention": False, "kv": "f16"},
        ]
        if case.kind == "prefill":
            others: list[Settings] = [{"n_ubatch": n} for n in (512, 64)]
        else:
            others = [{"kv_unified": unified} for unified in ((False, True) if case.batch > 1 else (False,))]
        weights: list[Settings] = [{"repack": True}, {"repack": False}] if cls.repacks else [{}]
        return [{**a, **b, **c} for c, b, a in itertools.product(weights, others, attention)]

    def start(self, prompts: np.ndarray) -> None:
        self._read(prompts)
        self._sample(prompts.shape[1])
        self._batch.begin_decode(self._n_sequences, prompts.shape[1])

    def decode(self, steps: int) -> int:
        for _ in range(steps):
            self._forward(self._tokens)
            self._sample(1)
        return steps * self._n_sequences

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        self._read(prompts)
        self._batch.begin_decode(self._n_sequences, prompts.shape[1])
        for column in range(following.shape[1]):
            self._forward(following[:, column])
        rows = [llama.llama_get_logits_ith(self._context, i) for i in range(self._n_sequences)]
        return np.array([np.ctypeslib.as_array(row, (self._vocab_size,)) for row in rows])

    def close(self) -> None:
        for sampler in self._samplers:
            llama.llama_sampler_free(sampler)
        llama.llama_free(self._context)

    def _read(self, prompts: np.ndarray) -> None:
        """Forget all sequences and read prompts (B, T)."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        self._batch.fill(prompts)
        self._run()

    def _forward(self, tokens: list[int] | np.ndarray) -> None:
        """Put the next token of each sequence through the model."""
        batch, n = self._batch, self._n_sequences
        batch.ids[:n] = tokens
        self._run()
        batch.positions[:n] += 1

    def _run(self) -> None:
        status = llama.llama_decode(self._context, self._batch.struct)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _sample(self, length: int) -> None:
        """Draw a token for each sequence. Its logits belong to every length-th token of the batch."""
        draw, context = llama.llama_sampler_sample, self._context
        self._tokens = [draw(chain, context, (i + 1) * length - 1) for i, chain in enumerate(self._samplers)]


def _sampler(seed: int) -> Any:
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(TEMPERATURE))
    llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_p(TOP_P, 1))
    llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
    return chain


class LlamaQ4(LlamaQ8):
    kind = "Q4_0"
    repacks = True
