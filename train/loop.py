"""The training loop: plain PyTorch, on a CPU or a GPU, alone or as one rank of a process group that others made.

It takes rows by step number, and hands metrics and states to two functions that the caller gives it; where those go,
who starts the workers and who restarts them is `train.run`'s business.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinylm.config import ModelConfig
from tinylm.tokenizer import Tokenizer
from train.config import ConfigError, Run, TrainConfig
from train.data import TokenData
from train.model import GPT
from train.muon import Muon
from train.start_from import load_start
from train.state import check_continues

LN2 = 0.6931471805599453
DRAWS = 1_000_003  # between the random numbers of one seed and the next
ADAMW_BETAS = (0.9, 0.98)
MUON_MOMENTUM = 0.95
MAX_GRADIENT_NORM = 1.0
FINAL_LR = 0.02  # share of the peak learning rate at the last step
AVERAGE_DECAY = 0.99  # of the running average of the weights, at each step


def total_steps(run: Run, config: ModelConfig) -> int:
    """Whole optimizer steps in the run's tokens, at least one."""
    return max(1, run.tokens // (run.batch_rows * config.context))


def lr_factor(step: int, steps: int, run: Run) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, constant, linear decay to FINAL_LR."""
    warmup = min(1.0, (step + 1) / (run.warmup_steps + 1))
    decay_from = run.constant_share * steps
    left = min(1.0, max(0.0, (steps - step) / max(1.0, steps - decay_from)))
    return warmup * (FINAL_LR + (1 - FINAL_LR) * left)


def make_optimizers(model: GPT, run: Run) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW without decay for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        Muon(matrices, run.muon_lr, MUON_MOMENTUM, run.weight_decay, bfloat16=run.bfloat16),
        torch.optim.AdamW(others, lr=run.adamw_lr, betas=ADAMW_BETAS, weight_decay=0.0),
    ]


def mean_loss(model: nn.Module, inputs: Tensor, tokens: Tensor, dropout: Tensor | None = None) -> Tensor:
    """Return the nats a token of the next tokens (B, T), predicted from inputs (B, T). dropout: (B,) of each row."""
    logits = model(inputs, dropout).flatten(0, 1).float()
    return F.cross_entropy(logits, tokens.flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, rows: Tensor, piece_bytes: Tensor, batch_rows: int = 16) -> float:
    """Code length of the rows' targets by the model over their UTF-8 bytes; boundaries and padding count as nothing.

    rows: (N, context + 1), -1 where there is no token. piece_bytes: (vocab,) bytes of each token.
    """
    nats = n_bytes = 0.0
    for batch in rows.split(batch_rows):
        targets = batch[:, 1:]
        size = torch.where(targets >= 0, piece_bytes[targets.clamp(min=0)], 0)
        logits = model(batch[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.clamp(min=0).flatten(), reduction="none")
        nats += float((loss * (size.flatten() > 0)).sum())
        n_bytes += float(size.sum())
    return nats / LN2 / n_bytes


@torch.no_grad()
def sample_story(model: nn.Module, tokenizer: Tokenizer, prompt: str, context: int, device: torch.device) -> str:
    """A story of up to half a context, at temperature 0.8, by the same random numbers every time."""
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer.encode_document(prompt)
    while len(ids) < context // 2:
        logits = model(torch.tensor([ids], device=device))[0, -1].float().cpu()
        token = int(torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1, generator=generator))
        if token == tokenizer.boundary_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def describe_machine(device: torch.device, world: int) -> str:
    """'NVIDIA X', '2 threads of Y CPU' or '2 workers of 1 thread of Y CPU', for the record of a run."""
    workers = f"{world} workers of " if world > 1 else ""
    if device.type == "cuda":
        return workers + torch.cuda.get_device_name(device)
    models = {line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")}
    n = torch.get_num_threads()
    processors = " / ".join(sorted(models)) or platform.processor() or "a CPU"
    return f"{workers}{n} thread{'s' if n > 1 else ''} of {processors}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def check_fits(config: TrainConfig, data: TokenData, world: int) -> None:
    """Raise ConfigError when the settings don't fit the data or the number of workers."""
    run, shape = config.run, config.model_config_
    if run.batch_rows % (world * run.micro_rows):
        raise ConfigError(
            f"run.batch_rows is {run.batch_rows}: it must be a multiple of "
            f"run.micro_rows x run.workers ({run.micro_rows} x {world})"
        )
    for key, of_tokens in (("vocab_size", data.vocab_size), ("boundary_id", data.boundary_id)):
        if (value := getattr(shape, key)) != of_tokens:
            raise ConfigError(f"model.{key} is {value}, but the tokens were made with {of_tokens}")


def train(
    config: TrainConfig,
    data: TokenData,
    tokenizer: Tokenizer,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[dict[str, Any]], None],
    state: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train from `state` (None: from the beginning) to the last step; returns the averaged model.

    `log` gets a dictionary each `log_every_steps` and each validation, on rank 0 only; `save` gets the whole state on
    every rank, equally often. Raises ConfigError when settings, data and state don't fit together.
    """
    run, shape, device = config.run, config.model_config_, torch.device(device)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    check_fits(config, data, world)
    started_from = ""
    if state is None and config.start_from:
        model, started_from = load_start(config.start_from, config, data)
    else:
        model = GPT(shape, seed=config.seed)
    model = model.to(device)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY)).eval()
    optimizers = make_optimizers(model, run)
    step, wall_before, machine = 0, 0.0, describe_machine(device, world)
    if state is not None:
        check_continues(state, config, data)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            # Moments come from the checkpoint, settings from the config of today.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        step, wall_before, started_from = state["step"], state["wall_s"], state["started_from"]
        last = state["machine"].split(", then ")[-1]
        machine = state["machine"] if last == machine else f"{state['machine']}, then {machine}"
    wrapped: nn.Module = model
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    if world > 1:
        wrapped = parallel = nn.parallel.DistributedDataParallel(model)
        no_sync = parallel.no_sync  # gradients are averaged once a step, at its last micro-batch
    if run.compile:
        model.compile_blocks()
    peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes], device=device)
    steps = total_steps(run, shape)
    micro_batches = run.batch_rows // (world * run.micro_rows)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.bfloat16 or device.type == "cuda")
    started = saved_at = time.monotonic()
    logged_at, logged_step = started, step
    losses: list[Tensor] = []

    def wall_s() -> float:
        return wall_before + time.monotonic() - started

    while step < steps:
        factor = lr_factor(step, steps, run)
        for optimizer, lrs in zip(optimizers, peak_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        first = step * run.batch_rows + rank * micro_batches * run.micro_rows
        torch.manual_seed(config.seed * DRAWS + first)  # all that is random follows from the step, as rows do
        loss_sum = torch.zeros((), device=device)
        for micro in range(micro_batches):
            here = (first + micro * run.micro_rows, run.micro_rows)
            rows = torch.from_numpy(data.mixture.rows(*here)).to(device)
            names = data.mixture.collections(*here)
            dropout = torch.tensor([run.dropout_of(name) for name in names], device=device)
            last = micro == micro_batches - 1
            with nullcontext() if last else no_sync():
                with autocast:
                    loss = mean_loss(wrapped, rows[:, :-1], rows[:, 1:], dropout if run.dropout else None)
                    loss = loss / micro_batches
                loss.backward()
            loss_sum += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        averaged.update_parameters(model)
        losses.append(loss_sum)
        step += 1

        is_last = step == steps
        if step % run.log_every_steps == 0 or is_last:
            mean = torch.stack(losses).mean()
            losses = []
            if world > 1:
                dist.all_reduce(mean)
                mean /= world
            now = time.monotonic()
            if rank == 0:
                log(
                    {
                        "step": step,
                        "steps": steps,
                        "tokens": step * run.batch_rows * shape.context,
                        "loss": round(float(mean), 4),
                        "lr": round(factor, 4),
                        "tokens_per_s": round(
                            (step - logged_step) * run.batch_rows * shape.context / (now - logged_at)
                        ),
                        "wall_s": round(wall_s(), 1),
                    }
                )
            logged_at, logged_step = now, step
        if rank == 0 and (step % run.validate_every_steps == 0 or is_last):
            val_bpb = {}
            for name in data.validation_collections:
                rows = torch.from_numpy(data.validation_rows(name, run.validate_rows)).to(device)
                val_bpb[name] = round(bits_per_byte(averaged, rows, piece_bytes), 4)
            log(
                {
                    "step": step,
                    "steps": steps,
                    "tokens": step * run.batch_rows * shape.context,
                    "val_bpb": val_bpb,
                    "sample": sample_story(averaged, tokenizer, run.sample_prompt, shape.context, device),
                    "epochs": {n: round(e, 2) for n, e in data.mixture.epochs(step * run.batch_rows).items()},
                    "wall_s": round(wall_s(), 1),
                }
            )
        if is_last or (step % run.checkpoint_every_steps == 0 and _agreed(_due(saved_at, run), world, device)):
            save(
                {
                    "step": step,
                    "wall_s": wall_s(),
                    "model": model.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "machine": machine,
                    "started_from": started_from,
                    "tokenizer_sha256": data.tokenizer_sha256,
                    "text_sha256": data.text_sha256,
                    "tokens_by_collection": data.mixture.tokens(step * run.batch_rows),
                    "config": config.model_dump(mode="json"),
                }
            )
            saved_at = time.monotonic()
    return averaged.module


def _due(saved_at: float, run: Run) -> bool:
    return time.monotonic() - saved_at >= run.checkpoint_every_s


def _agreed(due: bool, world: int, device: torch.device) -> bool:
    """Rank 0's clock decides for all, since every rank must save equally often."""
    if world == 1:
        return due
    decision = torch.tensor(float(due), device=device)
    dist.broadcast(decision, src=0)
    return bool(decision)
