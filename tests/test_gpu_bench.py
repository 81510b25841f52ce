"""The benchmark on a GPU, run small on a CPU with invented timings."""

import json
import math
import subprocess
import sys
import time

import pytest
import timm
import torch

from visattn.__main__ import main
from visattn.bench import gpu
from visattn.bench.gpu import attention, gates, maps, training
from visattn.bench.gpu.machine import Machine
from visattn.bench.gpu.report import BenchmarkReport, Check, Measurement
from visattn.bench.timing import Timing
from visattn.core.normalize import NORMALIZERS


@pytest.fixture
def here():
    """A CPU with an invented clock: each function runs once and takes its number in ms."""

    def measure(functions):
        for function in functions.values():
            function()
        return {name: Timing(turn, turn / 2, 2 * turn) for turn, name in enumerate(functions, 1)}

    def peak(function):
        function()
        return 3.0

    return Machine(
        torch.device("cpu"),
        measure,
        peak,
        lambda module: module,
        bytes_per_ms=1e3,
        flops_per_ms=1e6,
    )


def test_a_measurement_knows_its_ratio_its_share_and_its_aims():
    row = Measurement(
        "it", "N", "forward", Timing(3.0, 2.0, 4.0), "other", Timing(2.0, 1.0, 5.0), 1.5, 1.5, 0.7
    )
    assert row.ratio == 1.5 and row.share == 0.5 and row.met is False
    assert row.cells() == [
        "it",
        "N",
        "forward",
        "3 (2-4) ms",
        "other: 2 (1-5)",
        "1.50x",
        "50%",
        "<= 1.5x >= 70% not met",
    ]
    assert (
        Measurement(
            "it", "N", "forward", Timing(3.0, 2.0, 4.0), "other", Timing(2.0, 1.0, 5.0), 1.5
        ).met
        is True
    )
    bare = Measurement("it", "N", "forward", Timing(3.0, 2.0, 4.0))
    assert bare.ratio is bare.share is bare.met is None and bare.cells()[4:] == ["", "", "", ""]


def test_what_is_not_a_number_is_wrong():
    assert Check("it", "N", 1e-5, 1e-4).right
    assert str(Check("it", "N", math.nan, 1e-4)).startswith("WRONG: it, N: relative error nan")


def test_the_report_puts_correctness_first_and_says_what_was_not_measured(tmp_path):
    row = Measurement("it", "N", "forward", Timing(3.0, 2.0, 4.0), "other", Timing(2.0, 1.0, 5.0))
    report = BenchmarkReport(
        {"device": "D"},
        [Check("it", "N", 1e-5, 1e-4)],
        {"Tables": [row]},
        {"Gates": "the time was up"},
    )
    report.write(tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "gpu.md").read_text("utf-8")
    assert (
        text.index("device: D")
        < text.index("right: it")
        < text.index("| it ")
        < text.index("Gates: the time was up")
    )
    found = json.loads((tmp_path / "new" / "folder" / "gpu.json").read_text("utf-8"))
    assert found["sections"]["Tables"][0]["ratio"] == 1.5 and found["checks"][0]["right"] is True
    assert found["not_measured"] == {"Gates": "the time was up"}


def test_attention_is_compared_with_everything_there(here):
    assert all(check.right for check in attention.checks(here, 5, 17))
    rows = attention.rows(here, tokens=(5, 8), at_once=8)
    against = {(row.what, row.against) for row in rows if row.work == "forward"}
    package = (
        "entmax package" if "entmax package" in attention._peers(5) else "sort-based reference"
    )
    assert against >= {
        ("sigmoid", "SDPA softmax"),
        ("entmax15", "SDPA softmax"),
        ("entmax15", package),
    }
    first = next(row for row in rows if row.what == "entmax15")
    assert (
        first.ratio == 3.0 and first.aim == 1.5
    )  # the third function of the made-up clock against the first
    assert first.floor == pytest.approx(
        max(2 * 2 * 12 * 5 * 5 * 64 / 1e6, 2 * 4 * 12 * 5 * 64 / 1e3)
    )
    memory = [row for row in rows if row.unit == "MiB"]
    assert [row.what for row in memory] == ["sigmoid", "entmax15"] and memory[0].value.median == 3.0


def test_the_reference_by_sorting_is_entmax15():
    e = 3 * torch.randn(4, 5, 37, dtype=torch.double)
    torch.testing.assert_close(
        attention.entmax15_by_sorting(e, -1).double(),
        NORMALIZERS["entmax15"]()(e),
        atol=1e-5,
        rtol=0,
    )


def test_the_row_chain_is_compared_with_whole_matrices(here):
    assert all(check.right for check in maps.checks(here, "test_vit", 64))
    rows = maps.rows(here, "test_vit", 64)
    assert (
        [row.unit for row in rows] == ["ms", "MiB"]
        and rows[0].ratio == 0.5
        and rows[0].met is False
    )


def test_gates_are_compared_plain_compiled_and_with_timm(here):
    assert all(check.right for check in gates.checks(here, (2, 32, 7, 5)))
    rows = gates.rows(here, (2, 32, 7, 5))
    assert {row.what for row in rows} == set(gates.GATES)
    assert {row.what for row in rows if row.against == "timm"} == {"se", "eca", "cbam", "gc"}
    assert rows[0].floor == pytest.approx(7 * 2 * 2 * 32 * 7 * 5 / 1e3)


def test_training_steps_move_the_weights(here):
    (row,) = training.rows(here, ("vit_nano", "test_vit"), images=2, pixels=48)
    assert row.what == "vit_nano" and row.ratio == 0.5 and row.floor > 0
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    before = model[1].weight.clone()
    training._step(model, here)(torch.rand(2, 3, 2, 2), torch.tensor([0, 4]))
    assert not torch.equal(model[1].weight, before) and model[1].weight.grad is None


def test_operations_of_a_vit_are_counted():
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224")
    assert training.forward_flops(vit, 224) == pytest.approx(9.2e9, rel=0.02)


def test_a_section_that_fails_or_comes_late_leaves_the_others(here, monkeypatch):
    def fails(here):
        raise RuntimeError("out of\n memory")

    monkeypatch.setattr(gpu, "CHECKS", {"attention": lambda here: [Check("it", "N", 0.0, 1.0)]})
    monkeypatch.setattr(gpu, "SECTIONS", {"Gates": fails, "Rollout": lambda here: []})
    report = BenchmarkReport()
    gpu.fill_report(report, here, time.monotonic() + 60)
    assert len(report.checks) == 1 and report.sections == {"Rollout": []}
    assert report.missing == {"Gates": "RuntimeError: out of memory"}
    late = BenchmarkReport()
    gpu.fill_report(late, here, time.monotonic() - 1)
    assert not late.checks and set(late.missing.values()) == {"the time was up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_it_needs_no_more_than_torch_torchvision_timm_and_triton():
    absent = (
        "lightning",
        "rich",
        "jsonargparse",
        "albumentations",
        "matplotlib",
        "torchmetrics",
        "tensorboard",
        "cv2",
    )
    start = "runpy.run_module('visattn.bench.gpu', run_name='__main__')"
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); {start}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "nothing was measured: there is no CUDA device\n",
        "",
    )


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "nothing was measured: there is no CUDA device\n" and said.err == ""
    assert not (tmp_path / "out").exists()
