"""Speed: images per second of a training, the share of loading, and memory."""

import copy
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20  # bytes


class Speed(Callback):
    """Measure images per second of training, loading included, validation not."""

    def __init__(self):
        # of the whole training
        self.all_images = 0
        self.all_seconds = 0.0
        self.all_waited = 0.0  # seconds without a batch
        # of the current epoch
        self.images = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self._start_epoch()

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        # not called where a run resumes in the middle of an epoch: hence on_train_start too
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.start = time.perf_counter()
        self.images = 0

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        self.images += len(batch[0]) * trainer.world_size
        seconds = time.perf_counter() - self.start
        if batch_idx == 0 or trainer.global_step % trainer.log_every_n_steps == 0:
            rate = self.images / seconds
            pl_module.log("images/s", round(rate, 1), prog_bar=True, rank_zero_only=True)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.all_images += self.images
            self.all_seconds += seconds
            # other loaders than ours do not measure it
            self.all_waited += getattr(trainer.train_dataloader, "waited", 0.0)

    def facts(
        self,
        trainer: pl.Trainer,
        module,
    ) -> dict[str, Any]:
        """Return what result.json tells of speed and memory; None where it cannot be known."""
        device = trainer.strategy.root_device
        flops = forward_flops(module.model, module.network["image_size"])
        facts: dict[str, Any] = {
            "images_per_second": None,
            "loading_share": None,
            "gflops_per_image": None,
            "mfu": None,
            "peak_memory_mib": peak_memory(device),
        }
        if flops is not None:
            facts["gflops_per_image"] = round(flops / 1e9, 4)
        if self.all_seconds:
            rate = self.all_images / self.all_seconds
            facts["images_per_second"] = round(rate, 1)
            peak_flops = _peak_flops(device, str(trainer.precision))
            if flops and peak_flops:
                # a backward pass costs about two forward ones
                used_flops = 3 * flops * rate
                facts["mfu"] = round(used_flops / (peak_flops * trainer.world_size), 4)
        if self.all_waited:
            facts["loading_share"] = round(self.all_waited / self.all_seconds, 4)
        return facts


def _peak_flops(device: torch.device, precision: str) -> int | None:
    """Return the floating-point operations per second that a GPU can do; None where unknown."""
    if device.type != "cuda":
        return None
    dtype = torch.float32
    if "bf16" in precision:
        dtype = torch.bfloat16
    return get_available_flops(device, dtype)


def forward_flops(model: nn.Module, image_size: int | tuple[int, int]) -> int | None:
    """Count the floating-point operations of one image's forward pass, without running it."""
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    height, width = image_size
    try:
        twin = copy.deepcopy(model).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(torch.empty(1, 3, height, width, device="meta"))
    except Exception:  # a network that cannot run without data; the report goes without its cost
        return None
    return counter.get_total_flops()


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory so far in MiB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // MIB
    if sys.platform == "win32":
        return None
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes
        return peak // MIB
    return peak // 1024  # in KiB
