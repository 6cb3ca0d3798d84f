"""The training loop: plain PyTorch, on a CPU or a GPU, alone or as one rank of a process group.

It takes rows by step number, and passes log lines and checkpoints to two functions of the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinylm.system.machine import processor
from tinylm.tokenizer import Tokenizer
from train.config import ConfigError, TrainConfig
from train.core import amx
from train.core.checkpoint import Checkpoint, load_start
from train.core.model import GPT
from train.core.optimizers import lr_factor, make_optimizers
from train.core.ranks import Ranks
from train.core.record import Line
from train.core.validation import bits_per_byte, sample_story
from train.data.tokens import TokenData

SEED_STRIDE = 1_000_003  # between the random numbers of one seed and the next
MAX_GRADIENT_NORM = 1.0
VALIDATION_ROWS = 32  # of each collection
AVERAGE_DECAY = 0.99  # of the running average of the weights, at each step


def train(
    config: TrainConfig,
    data: TokenData,
    tokenizer: Tokenizer,
    log: Callable[[Line], None],
    save: Callable[[Checkpoint], None],
    checkpoint: Checkpoint | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train from a checkpoint, or from the beginning, to the last step; return the averaged model.

    `log` gets a line at each `log_every_steps` and at each validation, on rank 0 only. `save` gets checkpoints on every
    rank, equally often. Raises ConfigError when config, data and checkpoint do not fit together.
    """
    run = config.run
    trainer = Trainer(config, data, checkpoint, torch.device(device))
    saved_at = time.monotonic()
    while trainer.step < config.steps:
        trainer.take_step()
        is_last = trainer.step == config.steps
        if is_last or trainer.step % run.log_every_steps == 0:
            line = trainer.loss_line()  # every rank takes part in the mean loss
            if trainer.ranks.is_first:
                log(line)
        if trainer.ranks.is_first and (is_last or trainer.step % run.validate_every_steps == 0):
            log(trainer.validation_line(tokenizer))
        if is_last or (trainer.step % run.checkpoint_every_steps == 0 and trainer.is_due(saved_at)):
            save(trainer.checkpoint())
            saved_at = time.monotonic()
    return trainer.averaged.module


def check_fits(config: TrainConfig, data: TokenData, world: int) -> None:
    """Raise ConfigError when the settings do not fit the data or the number of workers."""
    run, shape = config.run, config.shape
    if run.batch_rows % (world * run.micro_rows):
        raise ConfigError(
            f"run.batch_rows is {run.batch_rows}: it must be a multiple of "
            f"run.micro_rows x run.workers ({run.micro_rows} x {world})"
        )
    for key, of_tokens in (("vocab_size", data.vocab_size), ("boundary_id", data.boundary_id)):
        if (value := getattr(shape, key)) != of_tokens:
            raise ConfigError(f"model.{key} is {value}, but the tokens were made with {of_tokens}")


class Trainer:
    """One rank's part of a run: the model, its running average, the optimizers, and the number of steps done."""

    def __init__(
        self, config: TrainConfig, data: TokenData, checkpoint: Checkpoint | None, device: torch.device
    ) -> None:
        self.config, self.data, self.device, self.ranks = config, data, device, Ranks.current()
        run = config.run
        check_fits(config, data, self.ranks.world)
        self._started_from = ""
        if checkpoint is None and config.start_from:
            self.model, self._started_from = load_start(config.start_from, config, data)
        else:
            self.model = GPT(config.shape, seed=config.seed)
        self.model.to(device)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY)).eval()
        with_tiles = run.compile and run.bfloat16 and device.type == "cpu" and amx.library() is not None
        self._optimizers = make_optimizers(self.model, run, with_tiles)
        self.step, self._wall_before_s, self._started_at = 0, 0.0, time.monotonic()
        self._machine = machine_name(device, self.ranks.world)
        if checkpoint is not None:
            self._restore(checkpoint)
        self._parallel = nn.parallel.DistributedDataParallel(self.model) if self.ranks.world > 1 else None
        self._cross_entropy = cross_entropy
        if run.compile:
            self.model.compile_blocks(with_tiles)
            self._cross_entropy = torch.compile(cross_entropy)
        self._lr_factor = 0.0  # of the last step
        self._peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._micro_batches = run.batch_rows // (self.ranks.world * run.micro_rows)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.bfloat16 or device.type == "cuda")
        self._losses: list[Tensor] = []  # since the last log line
        self._logged_at, self._logged_step = time.monotonic(), self.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_resumes(self.config, self.data)
        self.model.load_state_dict(checkpoint.model)
        self.averaged.load_state_dict(checkpoint.averaged)
        for optimizer, saved in zip(self._optimizers, checkpoint.optimizers, strict=True):
            # The moments come from the checkpoint, and the settings from the config.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.step, self._wall_before_s = checkpoint.step, checkpoint.wall_s
        self._started_from = checkpoint.started_from
        if checkpoint.machine.split(", then ")[-1] != self._machine:
            self._machine = f"{checkpoint.machine}, then {self._machine}"
        else:
            self._machine = checkpoint.machine

    def take_step(self) -> None:
        """Train on the rows of one step."""
        run, n = self.config.run, self._micro_batches
        self._set_learning_rates()
        first = self.step * run.batch_rows + self.ranks.rank * n * run.micro_rows
        torch.manual_seed(self.config.seed * SEED_STRIDE + first)  # a resumed run draws the same numbers
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(n):
            with self._gradients_are_averaged(micro == n - 1):
                loss = self._loss(first + micro * run.micro_rows) / n
                loss.backward()
            loss_sum += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.averaged.update_parameters(self.model)
        self.step += 1
        self._losses.append(loss_sum)

    def _set_learning_rates(self) -> None:
        self._lr_factor = lr_factor(self.step, self.config.steps, self.config.run)
        for optimizer, lrs in zip(self._optimizers, self._peak_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * self._lr_factor

    def _gradients_are_averaged(self, wanted: bool) -> AbstractContextManager[None]:
        """Return a context in which backward() averages gradients over the ranks, or does not."""
        return nullcontext() if wanted or self._parallel is None else self._parallel.no_sync()

    def _loss(self, first_row: int) -> Tensor:
        """Return the mean loss of one micro-batch, in nats per token."""
        run, mixture = self.config.run, self.data.mixture
        rows = torch.from_numpy(mixture.rows(first_row, run.micro_rows)).to(self.device)
        dropout = None
        if run.dropout:
            names = mixture.collections(first_row, run.micro_rows)
            dropout = torch.tensor([run.dropout_of(name) for name in names], device=self.device)
        with self._autocast:
            logits = (self._parallel or self.model)(rows[:, :-1], dropout)
            return self._cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def loss_line(self) -> Line:
        """Return the log line of the steps since the last one; every rank must call this."""
        loss = self.ranks.mean(torch.stack(self._losses).mean())
        now = time.monotonic()
        tokens = (self.step - self._logged_step) * self.config.tokens_per_step
        line = {
            **self._place(),
            "loss": round(float(loss), 4),
            "lr": round(self._lr_factor, 4),
            "tokens_per_s": round(tokens / (now - self._logged_at)),
            "wall_s": round(self._wall_s, 1),
        }
        self._losses, self._logged_at, self._logged_step = [], now, self.step
        return line

    def validation_line(self, tokenizer: Tokenizer) -> Line:
        """Return the log line of the averaged model: bits per byte of each collection, and a story."""
        run, context = self.config.run, self.config.shape.context
        piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes], device=self.device)
        val_bpb = {}
        for name in self.data.held_out:
            rows = torch.from_numpy(self.data.validation_rows(name, VALIDATION_ROWS)).to(self.device)
            val_bpb[name] = round(bits_per_byte(self.averaged, rows, piece_bytes), 4)
        epochs = self.data.mixture.epochs(self.step * run.batch_rows)
        return {
            **self._place(),
            "val_bpb": val_bpb,
            "sample": sample_story(self.averaged, tokenizer, run.sample_prompt, context, self.device),
            "epochs": {name: round(number, 2) for name, number in epochs.items()},
            "wall_s": round(self._wall_s, 1),
        }

    def _place(self) -> Line:
        return {"step": self.step, "steps": self.config.steps, "tokens": self.step * self.config.tokens_per_step}

    @property
    def _wall_s(self) -> float:
        return self._wall_before_s + time.monotonic() - self._started_at

    def is_due(self, saved_at: float) -> bool:
        """Return whether to save a checkpoint. Rank 0's clock decides, because every rank must save equally often."""
        due = time.monotonic() - saved_at >= self.config.run.checkpoint_every_s
        return self.ranks.decided_by_first(due, self.device)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            wall_s=self._wall_s,
            machine=self._machine,
            started_from=self._started_from,
            model=self.model.state_dict(),
            averaged=self.averaged.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self._optimizers],
            tokens_by_collection=self.data.mixture.tokens(self.step * self.config.run.batch_rows),
            tokenizer_sha256=self.data.tokenizer_sha256,
            text_sha256=self.data.text_sha256,
            config=self.config,
        )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def machine_name(device: torch.device, world: int) -> str:
    """Return where a run trains: 'NVIDIA X', '2 threads of Y CPU' or '2 workers of 1 thread of Y CPU'."""
    workers = f"{world} workers of " if world > 1 else ""
    if device.type == "cuda":
        return workers + torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"{workers}{n} thread{'s' if n > 1 else ''} of {processor()}"
