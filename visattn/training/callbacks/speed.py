"""Speed: images per second of a training, and what they cost."""

import copy
import sys
import time

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Speed(Callback):
    """Measure images per second of training, loading included, validation not."""

    def __init__(self):
        self.all_images, self.all_seconds, self.all_waited, self.images = 0, 0.0, 0.0, 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.start, self.images = time.perf_counter(), 0

    on_train_epoch_start = (
        on_train_start  # which a run that goes on in the middle of an epoch leaves out
    )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.images += len(batch[0]) * trainer.world_size
        now = time.perf_counter()
        if batch_idx == 0 or trainer.global_step % trainer.log_every_n_steps == 0:
            rate = self.images / (now - self.start)
            pl_module.log("images/s", round(rate, 1), prog_bar=True, rank_zero_only=True)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.all_images, self.all_seconds = (
                self.all_images + self.images,
                self.all_seconds + now - self.start,
            )
            self.all_waited += getattr(
                trainer.train_dataloader, "waited", 0.0
            )  # which others' loaders do not count

    def facts(self, trainer, pl_module) -> dict:
        """Return what result.json tells of speed and memory; None where it cannot be known."""
        rate = self.all_images / self.all_seconds if self.all_seconds else None
        flops = forward_flops(pl_module.model, pl_module.network["image_size"])
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        device = trainer.strategy.root_device
        peak = get_available_flops(device, dtype) if device.type == "cuda" else None
        # a backward pass costs about two forward ones
        known = rate and flops and peak
        return {
            "images_per_second": rate and round(rate, 1),
            "loading_share": round(self.all_waited / self.all_seconds, 4)
            if self.all_waited
            else None,
            "gflops_per_image": flops and round(flops / 1e9, 4),
            "mfu": round(3 * flops * rate / (peak * trainer.world_size), 4) if known else None,
            "peak_memory_mib": peak_memory(device),
        }


def forward_flops(model: nn.Module, image_size: int | tuple[int, int]) -> int | None:
    """Count the floating-point operations of one image's forward pass, without running it."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    try:
        twin = copy.deepcopy(model).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(torch.empty(1, 3, *size, device="meta"))
    except Exception:  # a network that cannot run without data; the report does without its cost
        return None
    return counter.get_total_flops()


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory held so far in MiB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if sys.platform == "win32":
        return None
    import resource  # which Windows does not have

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // (2**20 if sys.platform == "darwin" else 2**10)
