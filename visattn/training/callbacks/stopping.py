"""What ends a training early without losing it: signals, losses that are no numbers, and workers that died."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from visattn.training.errors import Interrupted, NotFinite, is_lost_worker

USR1 = getattr(signal, "SIGUSR1", None)  # Windows has none
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, USR1) if number is not None]


class StopOnSignal(Callback):
    """On Ctrl-C or SIGTERM finish the step, save last.ckpt and raise Interrupted; a second Ctrl-C stops at once.

    SIGUSR1 saves last.ckpt and goes on. In a job of SLURM, which sends it before the time is up
    (``#SBATCH --signal=SIGUSR1@90``), the job is put back into the queue and stops. A data worker
    that dies, as under a lack of memory, costs no step either.

    Args:
        checkpoint: Where the state is saved.
        every: With several processes, the number of steps between two agreements on whether to
            stop.
    """

    def __init__(self, checkpoint: Path, every: int = 8):
        self.checkpoint = checkpoint
        self.every = every
        self.received = 0
        self.saved = -1
        self.previous = {}

    def on_train_start(self, trainer, pl_module) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the validation that follows belongs to this epoch: stop when the next one begins
        if trainer.fit_loop._should_accumulate():
            return  # no checkpoint holds the gradients of the batches since the last step
        if trainer.world_size > 1 and trainer.global_step % self.every:
            return
        if number := self._agreed(trainer, pl_module):
            trainer.save_checkpoint(self.checkpoint)
            self._stop(number, trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        self.saved = trainer.global_step

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        # Where every batch is the last of its epoch nothing else stops; what it would save here
        # skips an epoch.
        if self.saved == trainer.global_step and (number := self._agreed(trainer, pl_module)):
            self._stop(number, trainer)

    def _agreed(self, trainer, pl_module) -> int:
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(self.received, device=pl_module.device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _stop(self, number: int, trainer) -> None:
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
        if number == USR1 and not job:
            self.received = 0
            return
        if number == USR1 and trainer.is_global_zero:
            task = os.environ.get("SLURM_ARRAY_TASK_ID")
            subprocess.run(["scontrol", "requeue", f"{job}_{task}" if task else job], check=False)
        raise Interrupted(number, self.checkpoint)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        if is_lost_worker(exception) and trainer.training and trainer.world_size == 1:
            trainer.save_checkpoint(self.checkpoint)

    def teardown(self, trainer, pl_module, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


class BetweenSteps(ModelCheckpoint):
    """Save by steps or minutes, but never while gradients are accumulated: no checkpoint holds them."""

    def on_train_batch_end(self, trainer, *given) -> None:
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, *given)


class StopOnNotFinite(Callback):
    """Stop at a loss that is no number, and never write weights that are none over a good checkpoint."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        # Reading the loss waits for an accelerator, so there it is read only as often as metrics
        # are logged.
        if pl_module.device.type != "cpu" and batch_idx % trainer.log_every_n_steps:
            return
        if not torch.isfinite(outputs["loss"]):
            raise NotFinite(
                f"the loss became {float(outputs['loss'])} at step {trainer.global_step - 1}"
            )

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        for name, parameter in pl_module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NotFinite(
                    f"the weight {name} is no longer finite after step {trainer.global_step - 1}"
                )
