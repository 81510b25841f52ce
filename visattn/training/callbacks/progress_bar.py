"""Bar: the progress of a training in one line."""

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
)
from rich.progress import TextColumn, TimeRemainingColumn
from rich.table import Column

METRICS = len("loss: 10.000 acc: 100% val: 99.9% img/s: 10000")
REST = len(" ") * 4 + len("00:00")


class Bar(RichProgressBar):
    """Show epoch, loss, accuracy and images per second in one line that fits a terminal of 80 columns."""

    SHOWN = (
        ("train_loss", "loss", ".3f"),
        ("train_accuracy", "acc", ".0%"),
        ("val_accuracy", "val", ".1%"),
        ("images/s", "img/s", ".0f"),
    )

    def get_metrics(self, trainer, pl_module) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        return {
            name: format(float(metrics[key]), form)
            for key, name, form in self.SHOWN
            if key in metrics
        }

    def configure_columns(self, trainer) -> list:
        epoch = max(
            len("Validation"), len(self._get_train_description((trainer.max_epochs or 1) - 1))
        )
        batches = 2 * len(str(trainer.num_training_batches)) + 1
        width = min(40, max(3, self._console.width - epoch - batches - METRICS - REST))
        styles = {
            "complete_style": self.theme.progress_bar,
            "finished_style": self.theme.progress_bar_finished,
            "pulse_style": self.theme.progress_bar_pulse,
        }
        return [
            TextColumn(
                "[progress.description]{task.description}", table_column=Column(no_wrap=True)
            ),
            CustomBarColumn(bar_width=width, **styles),
            BatchesProcessedColumn(style=self.theme.batch_progress),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        ]
