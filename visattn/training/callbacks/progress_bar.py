"""Bar: the progress of a training in one line."""

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
)
from rich.progress import TextColumn, TimeRemainingColumn
from rich.table import Column

# Columns of a terminal that the widest metrics need, and the gaps and remaining time beside them.
METRICS_WIDTH = len("loss: 10.000 acc: 100% val: 99.9% img/s: 10000")
TIME_WIDTH = len(" ") * 4 + len("00:00")

# Logged name, shown name and format of what stands beside the bar.
SHOWN_METRICS = (
    ("train_loss", "loss", ".3f"),
    ("train_accuracy", "acc", ".0%"),
    ("val_accuracy", "val", ".1%"),
    ("images/s", "img/s", ".0f"),
)


class Bar(RichProgressBar):
    """Show epoch, loss, accuracy and images per second in one line of a terminal of 80 columns."""

    def get_metrics(
        self,
        trainer,
        pl_module,
    ) -> dict[str, Any]:
        logged: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown = {}
        for key, name, number_format in SHOWN_METRICS:
            if key in logged:
                shown[name] = format(float(logged[key]), number_format)
        return shown

    def configure_columns(self, trainer) -> list:
        last_epoch = (trainer.max_epochs or 1) - 1
        epoch_text = self._get_train_description(last_epoch)
        epoch_width = max(len("Validation"), len(epoch_text))
        batches_width = 2 * len(str(trainer.num_training_batches)) + len("/")
        assert self._console is not None  # Lightning makes it before it asks for columns
        free_width = self._console.width - epoch_width - batches_width - METRICS_WIDTH - TIME_WIDTH
        return [
            TextColumn(
                "[progress.description]{task.description}", table_column=Column(no_wrap=True)
            ),
            CustomBarColumn(
                bar_width=min(40, max(3, free_width)),
                complete_style=self.theme.progress_bar,
                finished_style=self.theme.progress_bar_finished,
                pulse_style=self.theme.progress_bar_pulse,
            ),
            BatchesProcessedColumn(style=self.theme.batch_progress),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        ]
