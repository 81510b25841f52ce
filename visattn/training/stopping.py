"""What ends a training early without losing it: signals, losses that are no numbers, and workers that died."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

USR1 = getattr(signal, "SIGUSR1", None)  # Windows has none
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, USR1) if number is not None]


def lost_worker(error: BaseException) -> bool:
    """Whether a data worker died."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


class Interrupted(Exception):
    """Training was asked to stop; the last checkpoint is written."""

    def __init__(self, number: int, checkpoint: Path):
        self.checkpoint = checkpoint
        super().__init__(f"stopped by {signal.Signals(number).name}; the state is saved in {checkpoint}")
        self.number = number


class NotFinite(Exception):
    """The loss or a weight is no longer a number."""


class StopOnSignal(Callback):
    """On Ctrl-C or SIGTERM finish the step, save last.ckpt and raise Interrupted; a second Ctrl-C stops at once.

    SIGUSR1 saves last.ckpt and goes on. In a job of SLURM, which sends it before the time is up
    (``#SBATCH --signal=SIGUSR1@90``), the job is put back into the queue and stops. A data worker that dies, as under
    a lack of memory, costs no step either.

    Args:
        checkpoint: Where the state is saved.
        every: With several processes, the number of batches between two agreements on whether to stop.
    """

    def __init__(self, checkpoint: Path, every: int = 8):
        self.checkpoint = checkpoint
        self.every = every
        self.received = 0
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
            return  # the validation that follows belongs to this epoch: stop at the next batch
        number = self.received
        if trainer.world_size > 1:
            if batch_idx % self.every:
                return
            number = int(trainer.strategy.reduce(torch.tensor(number, device=pl_module.device), reduce_op="max"))
        if number:
            self._stop(number, trainer)

    def _stop(self, number: int, trainer) -> None:
        trainer.save_checkpoint(self.checkpoint)
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
        if number == USR1 and not job:
            self.received = 0
            return
        if number == USR1 and trainer.is_global_zero:
            task = os.environ.get("SLURM_ARRAY_TASK_ID")
            subprocess.run(["scontrol", "requeue", f"{job}_{task}" if task else job], check=False)
        raise Interrupted(number, self.checkpoint)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        if lost_worker(exception) and trainer.training and trainer.world_size == 1:
            trainer.save_checkpoint(self.checkpoint)

    def teardown(self, trainer, pl_module, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


class StopOnNotFinite(Callback):
    """Stop at a loss that is no number, and never write weights that are none over a good checkpoint."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        # Reading the loss waits for an accelerator, so there it is read only as often as metrics are logged.
        if pl_module.device.type != "cpu" and batch_idx % trainer.log_every_n_steps:
            return
        if not torch.isfinite(outputs["loss"]):
            raise NotFinite(f"the loss became {float(outputs['loss'])} at step {trainer.global_step - 1}")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        for name, parameter in pl_module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NotFinite(f"the weight {name} is no longer finite after step {trainer.global_step - 1}")
