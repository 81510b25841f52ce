"""What a training shows: bar, curves, classes, calibration, mistakes, heads, speed, loggers."""

import csv
import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from training_cases import keys

from visattn.data.module import ImageData
from visattn.models.presets import create_model
from visattn.models.weights import last_layer
from visattn.record import capture
from visattn.training import cli
from visattn.training.callbacks.progress_bar import Bar
from visattn.training.callbacks.speed import Speed, forward_flops, peak_memory
from visattn.training.invocation import command_words
from visattn.training.measures import measures, write_classes
from visattn.training.recipe import Recipe
from visattn.training.reports import plots
from visattn.training.reports.attention_overlays import AttentionOverlays, explain_batch
from visattn.training.reports.head_statistics import add_rows, head_statistics, read_rows
from visattn.training.reports.mistakes import Mistakes, collect, write_mistakes


@pytest.mark.parametrize(
    ("width", "epochs", "batches"), [(80, 22, 48), (80, 300, 1563), (120, 22, 48)]
)
def test_the_bar_is_one_line(width, epochs, batches):
    shown = io.StringIO()
    bar = Bar(console_kwargs={"width": width, "file": shown, "force_terminal": True})
    metrics = {
        "train_loss": 10.51234,
        "train_accuracy": 1.0,
        "val_accuracy": 0.92123,
        "images/s": 12345.6,
    }
    trainer = SimpleNamespace(
        progress_bar_metrics=metrics,
        progress_bar_callback=bar,
        max_epochs=epochs,
        current_epoch=epochs - 1,
    )
    trainer.state, trainer.sanity_checking, trainer.training = (
        SimpleNamespace(fn="fit"),
        False,
        True,
    )
    trainer.loggers, trainer.is_global_zero, trainer.num_training_batches = [], True, batches
    bar._trainer = trainer
    bar._init_progress(trainer)
    bar.train_progress_bar_id = bar._add_task(batches, bar._get_train_description(epochs - 1))
    bar._update(bar.train_progress_bar_id, batches)
    bar._update_metrics(trainer, None)
    bar.progress.stop()
    console = Console(width=width, file=io.StringIO())
    lines = [
        line for line in console.render_lines(bar.progress.get_renderable(), pad=False) if line
    ]
    text = "".join(segment.text for segment in lines[0]).rstrip()
    assert len(lines) == 1, text
    assert len(text) <= width
    for part in (
        f"Epoch {epochs - 1}/{epochs - 1}",
        f"{batches}/{batches}",
        "loss: 10.5",
        "acc: 100%",
        "val: 92.1%",
    ):
        assert part in text
    assert "img/s: 12346" in text


def test_few_steps_an_epoch_leave_a_curve_all_the_same(run):
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    assert [int(row["step"]) for row in rows] == [
        6,
        13,
    ]  # seven steps an epoch, though logging is every ten
    assert all(float(row["train_plain_loss"]) > 0 for row in rows)


def test_curves_compare_what_can_be_compared(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots.Figure, "savefig", lambda self, path, **options: drawn.update(figure=self)
    )
    rows = [
        {"step": 3, "train_loss": 2.0, "train_plain_loss": 1.0, "val_loss": 1.5},
        {"step": 7, "train_loss": 1.0},
    ]
    plots.draw_curves(rows, tmp_path / "curves.png")
    lines = {line.get_label(): line.get_ydata() for line in drawn["figure"].axes[0].lines}
    assert list(lines["training (augmented images)"]) == [1.0]
    assert list(lines["validation"]) == [1.5]


def test_table_of_classes(tmp_path):
    write_classes(
        torch.tensor([[3, 1, 0], [0, 0, 2], [0, 0, 0]]), ["a", "b", "c"], tmp_path / "classes.csv"
    )
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    wanted = {
        "images": "4",
        "precision": "1.0000",
        "recall": "0.7500",
        "f1": "0.8571",
        "most_often_taken_for": "b",
    }
    assert rows["a"] == {"class": "a", **wanted}
    assert (rows["b"]["precision"], rows["b"]["recall"], rows["b"]["most_often_taken_for"]) == (
        "0.0000",
        "0.0000",
        "c",
    )
    assert (rows["c"]["images"], rows["c"]["most_often_taken_for"]) == ("0", "")


def test_measures_by_hand():
    probabilities = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    labels = torch.tensor([0, 1, 1, 2])
    found = measures(3)
    found.update(probabilities, labels)
    values = found.compute()
    assert set(values) == {"accuracy", "ece"}
    assert float(values["accuracy"]) == 0.75
    assert float(values["ece"]) == pytest.approx(
        (0.1 + 0.6 + 0.5 + 0.6) / 4
    )  # four bins of one image each
    many = measures(7)
    many.update(torch.eye(7)[[0, 1]] * 0.4 + 0.01 * torch.arange(7), torch.tensor([3, 2]))
    assert float(many.compute()["top5"]) == 0.5


def test_result_tells_of_quality_and_cost(run):
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["val_ece"] <= 1
    assert result["images_per_second"] > 0 and 0 < result["loading_share"] < 1
    assert result["peak_memory_mib"] > 100
    assert result["mfu"] is None  # nobody knows what this processor could do
    assert result["gflops_per_image"] > 0
    with (run / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["images"]) for row in rows) == 21
    right = sum(float(row["recall"]) * int(row["images"]) for row in rows)
    assert right / 21 == pytest.approx(result["val_accuracy"], abs=1e-3)


def test_flops_of_a_linear_layer():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 5 * 7, 11))
    assert forward_flops(model, (5, 7)) == 2 * 3 * 5 * 7 * 11
    assert forward_flops(torch.nn.Linear(4, 4), (5, 7)) is None
    assert peak_memory(torch.device("cpu")) > 100


def test_speed_counts_every_process(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("visattn.training.callbacks.speed.time.perf_counter", lambda: next(clock))
    progress = SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=True))
    loops, loader = SimpleNamespace(epoch_loop=progress), SimpleNamespace(waited=0.5)
    trainer = SimpleNamespace(world_size=3, fit_loop=loops, train_dataloader=loader)
    logged = {}
    module = SimpleNamespace(log=lambda name, value, **options: logged.update({name: value}))
    speed = Speed()
    speed.on_train_epoch_start(trainer, module)
    speed.on_train_batch_end(trainer, module, None, (torch.zeros(5, 3), None), 0)
    assert logged == {"images/s": 7.5}
    assert (speed.all_images, speed.all_seconds, speed.all_waited) == (15, 2.0, 0.5)


# Mistakes.


def test_the_most_confident_mistakes_are_kept():
    found = Mistakes(2)
    images, labels = torch.rand(5, 3, 4, 4), torch.tensor([0, 0, 1, 1, 0])
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2], [0.1, 0.9], [0.05, 0.95]])
    found.add(images, labels, probabilities)
    found.add(images[:1], labels[:1], probabilities[:1])
    assert (found.wrong, found.total) == (3, 6)
    assert [(round(row.probability, 2), row.label, row.answer) for row in found.worst] == [
        (0.95, 0, 1),
        (0.8, 1, 0),
    ]
    assert torch.equal(found.worst[0].image, images[4])


def test_mistakes_of_a_run_are_one_offline_page(run):
    page = (run / "mistakes.html").read_text()
    result = json.loads((run / "result.json").read_text())
    wrong = round(21 * (1 - result["val_accuracy"]))
    assert f"{wrong} of 21 images" in page
    assert page.count("<figure>") == min(wrong, 24)
    assert page.count("data:image/png;base64,") == 2 * min(wrong, 24)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    truths = re.findall(
        r"<figcaption>(\w+), taken for .*<small>(?:.*/)?(\w+)/\d+.png</small>", page
    )
    assert len(truths) == min(wrong, 24)
    assert all(truth == folder for truth, folder in truths)


def test_a_page_without_mistakes_says_so(tmp_path):
    found = Mistakes()
    found.add(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    write_mistakes(found, None, None, tmp_path / "mistakes.html", torch.device("cpu"))
    assert "0 of 2 images" in (tmp_path / "mistakes.html").read_text()


def test_class_names_cannot_break_the_page(tmp_path):
    found = Mistakes()
    found.add(torch.rand(1, 3, 16, 16), torch.tensor([0]), torch.tensor([[0.1, 0.9]]))
    data = SimpleNamespace(
        classes=["<script>", "b & c"],
        transform_config=lambda: {"mean": [0.5] * 3, "std": [0.2] * 3},
    )
    write_mistakes(
        found,
        create_model("resnet8", num_classes=2),
        data,
        tmp_path / "page.html",
        torch.device("cpu"),
    )
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "b &amp; c" in page


def test_mistakes_are_those_of_validation(shapes):
    model, data = (
        create_model("resnet8", num_classes=3).eval(),
        ImageData(str(shapes), image_size=16, num_workers=0),
    )
    data.setup()
    images, labels = next(iter(data.val_dataloader()))
    found = collect(
        model, data.val_dataloader(), torch.device("cpu"), 21, Recipe(loss="bce", views="flip")
    )
    with torch.no_grad():
        values, answers = ((model(images) + model(images.flip(3))) / 2).sigmoid().max(1)
    missed = values[answers != labels].tolist()
    assert [row.probability for row in found.worst] == pytest.approx(sorted(missed, reverse=True))
    assert found.processes == 1 and len(found.file_names) == 21


def test_a_page_of_one_process_says_so(tmp_path):
    found = Mistakes()
    found.add(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    found.processes = 4
    write_mistakes(found, None, None, tmp_path / "mistakes.html", torch.device("cpu"))
    page = (tmp_path / "mistakes.html").read_text()
    assert (
        "Of the 2 images of the first of 4 processes 0 were mistaken; those of the others are not"
        in page
    )


def test_a_map_of_zeros_and_a_name_that_is_no_text_are_drawn(tmp_path):
    model, images = create_model("resnet8", num_classes=2).eval(), torch.rand(1, 3, 16, 16)
    torch.nn.init.zeros_(last_layer(model)[1].weight)
    found = Mistakes()
    found.add(images, torch.tensor([0]), torch.tensor([[0.1, 0.9]]))
    found.file_names = ["gr\udcfc\udcdfe.png"]
    data = SimpleNamespace(
        classes=["a", "b"], transform_config=lambda: {"mean": [0.5] * 3, "std": [0.2] * 3}
    )
    write_mistakes(found, model, data, tmp_path / "page.html", torch.device("cpu"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "gr??e.png" in page and "gradcam" in page
    overlays = AttentionOverlays(tmp_path)
    overlays.labels = [torch.tensor(0)]
    overlays._draw(
        [np.zeros((16, 16, 3), np.uint8)],
        explain_batch(model, images).heat,
        torch.tensor([[0.1, 0.9]]),
        ["a", "b"],
    )


# Heads.


def test_entropy_and_distance_by_hand():
    torch.manual_seed(0)
    options = {"dim": 12, "depth": 2, "num_heads": 3, "patch_size": 4, "num_registers": 1}
    model = create_model("vit_nano", num_classes=3, image_size=(12, 20), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with capture(model) as maps:
        model(torch.rand(2, 3, 12, 20))
    found = head_statistics(maps)
    assert len(found) == 6
    places = [(y, x) for y in range(3) for x in range(5)]
    for row in found:
        alpha = maps.layer(row["layer"]).weights()[:, row["head"]].double().numpy()
        entropy = -(alpha * np.log(alpha)).sum(-1).mean() / math.log(17)
        patches = alpha[:, 2:, 2:] / alpha[:, 2:, 2:].sum(-1, keepdims=True)
        far = np.array([[math.dist(a, b) / 5 for b in places] for a in places])
        assert row["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert row["distance"] == pytest.approx((patches * far).sum(-1).mean(), rel=1e-4)


def test_tiles_do_not_change_the_statistics(monkeypatch):
    model = create_model(
        "vit_nano", num_classes=3, image_size=24, dim=12, num_heads=3, depth=1
    ).eval()
    with capture(model) as maps:
        model(torch.rand(2, 3, 24, 24))
    whole = head_statistics(maps)
    monkeypatch.setattr("visattn.training.reports.head_statistics.TILE", 1)
    for row, again in zip(whole, head_statistics(maps), strict=True):
        assert (row["layer"], row["head"]) == (again["layer"], again["head"])
        assert (row["entropy"], row["distance"]) == pytest.approx(
            (again["entropy"], again["distance"]), rel=1e-5
        )


def test_windows_have_an_entropy_but_no_distance():
    options = {
        "relation": "window",
        "window_size": 2,
        "class_token": False,
        "pool": "mean",
        "patch_size": 4,
    }
    model = create_model(
        "vit_nano", num_classes=3, image_size=16, dim=12, num_heads=3, depth=1, **options
    ).eval()
    with capture(model) as maps:
        model(torch.rand(2, 3, 16, 16))
    found = head_statistics(maps)
    assert all(row["distance"] is None and 0 < row["entropy"] <= 1 for row in found)


def test_heads_of_a_run_are_watched(run):
    rows = read_rows(run / "attention" / "heads.csv")
    assert [int(row["step"]) for row in rows[::4]] == [7, 14]  # two layers of two heads
    with Image.open(run / "attention" / "heads.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 20


def test_rows_after_the_resumed_step_are_replaced(tmp_path):
    row = {"layer": "a", "head": 0, "entropy": 0.5, "distance": None}
    for step in (3, 6, 9, 6):
        add_rows(tmp_path / "heads.csv", step, [row])
    assert [row["step"] for row in read_rows(tmp_path / "heads.csv")] == ["3", "6"]


# Loggers and words.


def test_further_loggers_join_the_own_ones(shapes, tmp_path):
    logger = {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": tmp_path / "more"}
    further = [part for key, value in logger.items() for part in (f"--{key}", str(value))]
    cli.main(["fit", *keys(shapes, tmp_path / "run", trainer__max_epochs=1), *further])
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert list((tmp_path / "more").rglob("metrics.csv"))


def test_proposed_commands_fit_how_the_program_was_started(monkeypatch):
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert command_words("visattn") == "uv run visattn"
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH")
    monkeypatch.setattr("visattn.training.invocation.shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("visattn.training.invocation.sys.executable", "/bin/python")
    assert command_words("visattn") == "visattn"
    assert command_words("train.py") == "python train.py"
    monkeypatch.setattr("visattn.training.invocation.shutil.which", lambda name: None)
    assert command_words("visattn") == "/bin/python -m visattn"
    assert command_words("train.py") == "/bin/python train.py"
