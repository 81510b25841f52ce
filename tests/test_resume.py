"""Nothing is lost: signals, dead workers, full disks, damaged checkpoints, requeued jobs."""

import errno
import json
import os
import signal
import stat

import pytest
import torch
import yaml
from training_cases import keys, refusal, same, weights

from visattn.data.loader import ImageSet
from visattn.training import cli
from visattn.training.checkpoint_io import AtomicCheckpointIO, find_checkpoint, read_checkpoint
from visattn.training.resume import (
    belongs_to_run,
    choose_checkpoint,
    list_changes,
    refuse_other_optimizer,
)
from visattn.training.tune import steepest

# Signals.


def test_usr1_saves_and_goes_on(run, shapes, tmp_path, at_step, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    at_step(9, lambda: signal.raise_signal(signal.SIGUSR1))
    steps, save = [], AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        steps.append(checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    cli.main(["fit", *keys(shapes, tmp_path / "run")])
    assert 10 in steps
    assert same(
        weights(tmp_path / "run/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt")
    )


@pytest.mark.parametrize(
    ("options", "stopped"),
    [
        (
            {"data__batch_size": 32, "trainer__max_epochs": 4},
            2,
        ),  # one batch per epoch, each the last
        ({"trainer__accumulate_grad_batches": 3}, 2),
    ],
)
def test_stopping_waits_for_the_epoch_and_the_accumulation(
    options, stopped, shapes, tmp_path, at_step
):
    cli.main(["fit", *keys(shapes, tmp_path / "whole", **options)])
    at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        cli.main(["fit", *keys(shapes, tmp_path / "cut", **options)])
    assert read_checkpoint(tmp_path / "cut/checkpoints/last.ckpt")["global_step"] == stopped
    cli.main(["fit", *keys(shapes, tmp_path / "cut", **options), "--ckpt_path", "last"])
    whole, cut = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "cut"))
    assert same(whole, cut)


def test_no_checkpoint_in_the_middle_of_an_accumulation(shapes, tmp_path, monkeypatch):
    batches, save = [], AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        batches.append(
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
        )
        save(self, checkpoint, path, storage_options)

    several = {"trainer__accumulate_grad_batches": 3}
    cli.main(["fit", *keys(shapes, tmp_path / "run", **several, trainer__max_epochs=1)])
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    cli.main(
        [
            "fit",
            *keys(shapes, tmp_path / "run", **several, checkpoint_steps=1),
            "--ckpt_path",
            "last",
        ]
    )
    assert set(batches) == {3, 6, 7}


def test_slurm_puts_the_job_back_and_goes_on(run, shapes, tmp_path, at_step, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    for key, value in {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(
        "SLURM_JOB_NAME", "interactive"
    )  # or Lightning would look for the other tasks of the job
    at_step(9, lambda: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(SystemExit) as left:
        cli.main(["fit", *keys(shapes, tmp_path / "run")])
    assert left.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text().split() == ["requeue", "77"]
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 10
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    cli.main(["fit", *keys(shapes, tmp_path / "run")])  # the same command, as SLURM gives it
    assert same(
        weights(tmp_path / "run/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt")
    )
    assert not (tmp_path / "run.1").exists()


def test_a_first_start_takes_no_checkpoint(run, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert choose_checkpoint(run, None, "fit") == (None, "")
    assert choose_checkpoint(run, None, "validate")[0].name == "best.ckpt"
    assert choose_checkpoint(run, "none", "validate") == (None, "")


def test_a_dead_worker_costs_no_step(run, shapes, tmp_path, monkeypatch, capsys):
    sample = ImageSet.__getitem__

    def die(self, key):
        if not isinstance(key, int) and key.epoch == 1 and torch.utils.data.get_worker_info():
            os._exit(9)
        return sample(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "__getitem__", die)
        one = keys(shapes, tmp_path / "run", data__num_workers=1, data__start_method="fork")
        assert "a data worker died" in refusal(["fit", *one], capsys, code=1)
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 7
    cli.main(["fit", *keys(shapes, tmp_path / "run"), "--ckpt_path", "last"])
    assert same(
        weights(tmp_path / "run/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt")
    )


def test_workers_can_be_spawned(run, shapes, tmp_path):
    spawned = keys(
        shapes,
        tmp_path / "run",
        data__num_workers=1,
        data__start_method="spawn",
        trainer__max_epochs=2,
    )
    cli.main(["fit", *spawned])
    assert same(
        weights(tmp_path / "run/checkpoints/last.ckpt"), weights(run / "checkpoints/last.ckpt")
    )


# Files.


def test_the_store_never_writes_over_what_stands(tmp_path, monkeypatch):
    store, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        store.save_checkpoint({"step": step}, path)
    kept = (
        torch.load(path, weights_only=True),
        torch.load(path.with_name("previous.ckpt"), weights_only=True),
    )
    assert kept == ({"step": 2}, {"step": 1})

    def full(content, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("visattn.training.checkpoint_io.torch.save", full)
    with pytest.raises(OSError, match=r"last.ckpt could not be saved: No space left on device"):
        store.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_full_disk_stops_with_one_line(shapes, tmp_path, monkeypatch, capsys):
    save = torch.save

    def full(content, file):
        if content["global_step"] == 14:
            raise OSError(errno.ENOSPC, "no space")
        save(content, file)

    monkeypatch.setattr("visattn.training.checkpoint_io.torch.save", full)
    assert "No space left" in refusal(["fit", *keys(shapes, tmp_path / "run")], capsys)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, shapes, tmp_path, at_step, capsys):
    at_step(11, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        cli.main(["fit", *keys(shapes, tmp_path / "run", checkpoint_steps=5)])
    last = find_checkpoint(tmp_path / "run", "last")
    assert [
        read_checkpoint(last.with_name(f"{name}.ckpt"))["global_step"]
        for name in ("last", "previous")
    ] == [12, 10]
    last.write_bytes(last.read_bytes()[:3000])
    cli.main(["fit", *keys(shapes, tmp_path / "run"), "--ckpt_path", "last"])
    said = capsys.readouterr().out
    assert "last.ckpt is damaged" in said
    assert "using" in said and "previous.ckpt" in said
    assert same(weights(last), weights(run / "checkpoints" / "last.ckpt"))


def test_the_last_checkpoint_may_be_missing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "previous"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
        assert (
            find_checkpoint(tmp_path, "last").stem == name
        )  # a kill between two renames leaves no last
    assert find_checkpoint(tmp_path, "best").stem == "best"


# What is said.


def test_what_changed_is_reported_on_resume(run, shapes, tmp_path, capsys):
    cli.main(["fit", *keys(shapes, tmp_path / "run", trainer__max_epochs=1)])
    capsys.readouterr()
    cli.main(["fit", *keys(shapes, tmp_path / "run", model__lr=1e-5), "--ckpt_path", "last"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert lines == [
        "changed since the run was stopped: model.lr: 0.001 -> 1e-05",
        "changed since the run was stopped: trainer.max_epochs: 1 -> 2",
    ]
    assert (
        yaml.safe_load((tmp_path / "run/config.yaml").read_text())["ckpt_path"] is None
    )  # a new run of it is new


def test_a_run_without_its_config_goes_on(tmp_path):
    assert list_changes(tmp_path, {"model": {"lr": 1}}) == []
    (tmp_path / "config.yaml").write_text("a: [")
    assert list_changes(tmp_path, {"model": {"lr": 1}}) == []


def test_a_run_goes_on_from_its_own_checkpoints(tmp_path):
    own = tmp_path / "run" / "checkpoints" / "last.ckpt"
    own.parent.mkdir(parents=True)
    own.touch()
    assert belongs_to_run(tmp_path / "run", tmp_path / "run/../run/checkpoints/last.ckpt")
    assert not belongs_to_run(tmp_path / "other", own)
    with pytest.raises(ValueError, match="would move aside"):
        belongs_to_run(tmp_path / "run", tmp_path / "run" / "kept.ckpt")


def test_the_state_of_other_weights_is_refused():
    groups = [{"params": [0], "param_names": ["blocks.0.weight"]}]
    found = {"visattn": {}, "optimizer_states": [{"param_groups": groups}]}
    refuse_other_optimizer(found, groups, "adamw")
    with pytest.raises(ValueError, match="freeze"):
        refuse_other_optimizer(
            found, [{"params": [0], "param_names": ["blocks.1.weight"]}], "adamw"
        )


def test_a_complete_run_says_so(run, shapes, tmp_path, capsys):
    whole = tmp_path / "whole"
    cli.main(["fit", *keys(shapes, whole, trainer__max_epochs=1)])
    before = json.loads((whole / "result.json").read_text())
    cli.main(["fit", *keys(shapes, whole, trainer__max_epochs=1), "--ckpt_path", "last"])
    said = capsys.readouterr().out
    assert "the run was complete after 1 epochs; to train longer: --trainer.max_epochs 2" in said
    assert json.loads((whole / "result.json").read_text()) == before


def test_tune_names_a_rate(shapes, tmp_path, capsys):
    cli.main(["tune", *keys(shapes, tmp_path / "run", data__batch_size=2)])
    said = capsys.readouterr().out
    assert "--model.lr" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [
        "rates.png"
    ]  # a run's folder keeps its config


def test_the_rate_of_the_steepest_fall():
    rates = [10.0**power for power in range(-6, 1)]
    assert steepest(rates, [2.3, 2.2, 2.1, 1.5, 1.0, 1.1, 9.0]) == pytest.approx(1e-3)
    assert steepest(rates, [2.3, 2.2, 2.1, 1.5, 1.0, float("nan"), float("inf")]) == pytest.approx(
        1e-3
    )
    assert steepest(rates[:2], [2.0, 1.0]) is None
