"""What ends a training early without losing it: signals, losses that are NaN, dead workers."""

import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from visattn.training.errors import Interrupted, NotFinite, is_lost_worker

USR1: int | None = getattr(signal, "SIGUSR1", None)  # Windows has none
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, USR1) if number is not None]


class StopOnSignal(Callback):
    """On Ctrl-C or SIGTERM finish the step, save last.ckpt and raise Interrupted.

    A second Ctrl-C stops at once. SIGUSR1 saves last.ckpt and goes on; in a job of SLURM, which
    sends it before the time is up (``#SBATCH --signal=SIGUSR1@90``), the job is put back into the
    queue and stops. A data worker that dies, as under a lack of memory, costs no step either.

    Args:
        checkpoint: Where the state is saved.
        every: With several processes, the number of steps between two agreements on whether to
            stop.
    """

    def __init__(self, checkpoint: Path, every: int = 8):
        self.checkpoint = checkpoint
        self.every = every
        self.signal_number = 0  # 0 = none
        self.saved_step = -1
        self.previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python accepts handlers in the main thread alone
        for number in SIGNALS:
            self.previous_handlers[number] = signal.signal(number, self._remember)

    def _remember(
        self,
        number: int,
        frame: FrameType | None,
    ) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the validation that follows belongs to this epoch: stop when the next begins
        if trainer.fit_loop._should_accumulate():
            return  # no checkpoint holds the gradients of the batches since the last step
        if trainer.world_size > 1 and trainer.global_step % self.every:
            return
        number = self._agree(trainer, pl_module.device)
        if number:
            trainer.save_checkpoint(self.checkpoint)
            self._stop(number, trainer)

    def on_save_checkpoint(
        self,
        trainer,
        pl_module,
        checkpoint: dict[str, Any],
    ) -> None:
        self.saved_step = trainer.global_step

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        # Where every batch is the last of its epoch nothing else stops; a checkpoint saved here
        # would skip an epoch.
        if self.saved_step != trainer.global_step:
            return
        number = self._agree(trainer, pl_module.device)
        if number:
            self._stop(number, trainer)

    def _agree(
        self,
        trainer: pl.Trainer,
        device: torch.device,
    ) -> int:
        """Return a signal that any process received, or 0."""
        if trainer.world_size == 1:
            return self.signal_number
        number = torch.tensor(self.signal_number, device=device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _stop(
        self,
        number: int,
        trainer: pl.Trainer,
    ) -> None:
        """Raise Interrupted; after SIGUSR1 requeue the job of SLURM, or go on outside of one."""
        if number == USR1:
            job = _slurm_job()
            if job is None:
                self.signal_number = 0
                return
            if trainer.is_global_zero:
                subprocess.run(["scontrol", "requeue", job], check=False)
        raise Interrupted(number, self.checkpoint)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        if is_lost_worker(exception) and trainer.training and trainer.world_size == 1:
            trainer.save_checkpoint(self.checkpoint)

    def teardown(self, trainer, pl_module, stage: str) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}


def _slurm_job() -> str | None:
    """Return SLURM's name of this job, with the task of an array; None outside of SLURM."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if job and task:
        return f"{job}_{task}"
    return job or None


class BetweenSteps(ModelCheckpoint):
    """Save by steps or minutes, but not between accumulated gradients: no checkpoint holds them."""

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class StopOnNotFinite(Callback):
    """Stop at an infinite or NaN loss, and never write such weights over a good checkpoint."""

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        # Reading the loss waits for an accelerator, so there it is read only as often as metrics
        # are logged.
        is_cpu = pl_module.device.type == "cpu"
        if not is_cpu and batch_idx % trainer.log_every_n_steps:
            return
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            step = trainer.global_step - 1
            raise NotFinite(f"the loss became {float(loss)} at step {step}")

    def on_save_checkpoint(
        self,
        trainer,
        pl_module,
        checkpoint: dict[str, Any],
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            if not torch.isfinite(parameter).all():
                step = trainer.global_step - 1
                raise NotFinite(f"the weight {name} is no longer finite after step {step}")
