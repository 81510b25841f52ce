"""Data under Lightning: resuming, predicting, and what a checkpoint keeps."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from data_cases import CLASSES, HALF, image_data, make_tree
from torch.nn.functional import cross_entropy

from visattn.data.module import ImageData


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "photos")


class _Probe(pl.LightningModule):
    """Remembers what each step saw, and saves a checkpoint wherever it is asked to."""

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.linear, self.folder, self.seen = torch.nn.Linear(3 * 11 * 17, 3), folder, {}

    def training_step(self, batch, number):
        images, labels = batch
        self.seen[self.global_step] = (
            self.current_epoch,
            labels.tolist(),
            images.double().sum().item(),
        )
        return cross_entropy(self.linear(images.flatten(1)), labels)

    def validation_step(self, batch, number):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def save(self, name: str) -> None:
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{name}-{self.global_step}.ckpt")

    def on_train_batch_end(self, *_):
        self.save("step")

    def on_train_epoch_end(self):
        self.save("epoch")

    def on_validation_end(self):
        self.save("val")


def fit(
    data: ImageData,
    tmp_path: Path,
    folder: Path | None = None,
    checkpoint: Path | None = None,
    **options,
):
    probe = _Probe(folder)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Lightning's own: few workers, and names that torch has deprecated
        trainer.fit(probe, data, ckpt_path=checkpoint)
    return probe.seen


@pytest.mark.parametrize(
    "options", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}], ids=str
)
def test_lightning_resumes_with_the_batches_an_unbroken_run_sees(tree, tmp_path, options):
    unbroken = fit(image_data(tree), tmp_path, folder=tmp_path, **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert {path.name.split("-")[0] for path in checkpoints} == {"step", "epoch", "val"}
    for path in checkpoints:
        done = int(path.stem.split("-")[1])
        resumed = fit(image_data(tree), tmp_path, checkpoint=path, **options)
        assert resumed == {step: seen for step, seen in unbroken.items() if step >= done}, path.name


def test_lightning_predicts_file_names(tree, tmp_path):
    class Names(_Probe):
        def predict_step(self, batch, number):
            return batch[1]

    data = ImageData(
        predict_root=str(tree / "val"), image_size=8, batch_size=3, num_workers=0, **HALF
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for batch in trainer.predict(Names(), data) for name in batch]
    assert names == sorted(
        path.relative_to(tree / "val").as_posix() for path in tree.glob("val/*/[0-9]*.png")
    )


def test_checkpoint_keeps_transform_and_refuses_other_classes(tree, tmp_path):
    state = image_data(tree, mean=None, std=None).state_dict()
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    predicting = ImageData(predict_root=str(tree / "val"), image_size=(11, 17), num_workers=0)
    predicting.setup("predict")
    with pytest.raises(ValueError, match="no images for train"):
        predicting.predict_dataloader()
    predicting.load_state_dict(state)
    assert predicting.transform_config() == state["transform"] and predicting.classes == CLASSES
    assert image_data(tree).transform_config()["mean"] == [
        0.5,
        0.5,
        0.5,
    ]  # given, so not taken from anywhere
    other = image_data(tree)
    state["classes"] = ["ant", "bee", "dog"]
    with pytest.raises(
        ValueError,
        match=r"other classes: only in the checkpoint \['dog'\], only in the data \['cat'\]",
    ):
        other.load_state_dict(state)
    state["classes"] = CLASSES[::-1]
    with pytest.raises(ValueError, match="other classes: the data have them in another order"):
        other.load_state_dict(state)
