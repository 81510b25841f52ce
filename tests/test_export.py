"""Export: safetensors, torch.export and ONNX give the model's scores; folders of the hub."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from training_cases import keys

from visattn.__main__ import main
from visattn.commands import export
from visattn.commands.export import compare, trace
from visattn.data.transform import EvalTransform
from visattn.models.presets import create_model
from visattn.training import cli
from visattn.training.classifier import Classifier, load_classifier
from visattn.training.model_file import read_model

CLASSES = ["alpha", "beta", "gamma"]
TRANSFORM = {"image_size": [24, 40], "resize": "cover", "mean": [0.5] * 3, "std": [0.25] * 3}
VIT = {
    "name": "vit_nano",
    "num_classes": 3,
    "image_size": [24, 40],
    "options": {"dim": 16, "depth": 2, "num_heads": 2},
}


def checkpoint(folder: Path, network: dict) -> Path:
    torch.manual_seed(0)
    options = network.get("options", {})
    model = create_model(
        network["name"], num_classes=3, image_size=tuple(network["image_size"]), **options
    )
    note = {"format": 1, "network": network, "classes": CLASSES, "transform": TRANSFORM}
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"visattn": note, "state_dict": weights}, folder / "checkpoints" / "best.ckpt")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("runs") / "vit", VIT)


def call(*words) -> int:
    return main(["export", *map(str, words)])


def probabilities(classifier: Classifier) -> torch.Tensor:
    return classifier(Image.linear_gradient("L"))


def test_safetensors_hold_the_whole_classifier(run_folder, tmp_path, capsys):
    assert call(run_folder, "--to", "safetensors", "--out", tmp_path / "deep" / "x") == 0
    assert "x.safetensors takes (B, 3, 24, 40): any batch, height, width" in capsys.readouterr().out
    again = load_classifier(tmp_path / "deep" / "x.safetensors")
    assert again.classes == CLASSES and again.transform.config() == TRANSFORM
    torch.testing.assert_close(
        probabilities(again), probabilities(load_classifier(run_folder)), rtol=0, atol=0
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_export_lies_beside_the_run_and_leaves_its_checkpoint_first(run_folder):
    assert call(run_folder, "--to", "safetensors") == 0
    assert (run_folder / "model.safetensors").is_file()
    (run_folder / "model.safetensors").write_bytes(b"")
    assert load_classifier(run_folder).classes == CLASSES
    (run_folder / "model.safetensors").unlink()


def test_torch_export_is_dynamic_and_carries_its_note(run_folder, tmp_path, capsys):
    assert call(run_folder, "--to", "torch_export", "--out", tmp_path / "x.pt2") == 0
    assert "any batch, height, width" in capsys.readouterr().out
    extra = {"visattn.json": ""}
    module = torch.export.load(tmp_path / "x.pt2", extra_files=extra).module()
    assert json.loads(extra["visattn.json"])["classes"] == CLASSES
    images = torch.randn(3, 3, 56, 48)
    torch.testing.assert_close(
        module(images), load_classifier(run_folder).model(images), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"is a graph, not a network: open it with torch\.export\.load"
    ):
        load_classifier(tmp_path / "x.pt2")


def test_onnx_is_dynamic_and_carries_its_note(run_folder, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert call(run_folder, "--to", "onnx", "--out", tmp_path / "x.onnx") == 0
    assert "any batch, height, width" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    note = json.loads(session.get_modelmeta().custom_metadata_map["visattn"])
    assert note["classes"] == CLASSES and note["transform"] == TRANSFORM
    images = torch.randn(4, 3, 32, 48)
    (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(scores), load_classifier(run_folder).model(images), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"open it with onnxruntime\.InferenceSession"):
        load_classifier(tmp_path / "x.onnx")


class Spectrum(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x):
        return torch.linalg.svdvals(x.flatten(2))


def classifier_of(model: nn.Module) -> Classifier:
    return Classifier(model, EvalTransform((24, 40)), CLASSES, network=VIT)


def test_a_network_of_one_size_is_exported_for_any_batch(tmp_path, monkeypatch, capsys):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 40, 3))
    monkeypatch.setattr(export, "load_classifier", lambda path: classifier_of(flat))
    assert call(tmp_path / "run", "--to", "torch_export", "--out", tmp_path / "x.pt2") == 0
    assert "(B, 3, 24, 40): any batch;" in capsys.readouterr().out


def test_an_operator_that_onnx_lacks_names_the_module(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(nn.ReLU(), Spectrum()), nn.Linear(3, 3))
    monkeypatch.setattr(export, "load_classifier", lambda path: classifier_of(model))
    assert call(tmp_path / "run", "--to", "onnx", "--out", tmp_path / "x.onnx") == 2
    told = capsys.readouterr().err
    assert (
        "ONNX has no operator for aten._linalg_svd.default, which the module '1.1' (Spectrum) needs"
        in told
    )
    assert not list(tmp_path.glob("*.onnx"))


class Branching(nn.Module):
    """What torch.export cannot trace."""

    def forward(self, x):
        return x.flatten(1)[:, :3] if x.mean() > 0 else -x.flatten(1)[:, :3]


def test_what_cannot_be_traced_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "load_classifier", lambda path: classifier_of(Branching()))
    assert call(tmp_path / "run", "--to", "torch_export", "--out", tmp_path / "x") == 2
    told = capsys.readouterr().err
    assert (
        told.startswith("visattn export: torch.export cannot trace the model: ")
        and told.count("\n") == 1
    )
    assert not (tmp_path / "x.pt2").exists()


def test_other_scores_are_no_success(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        export.WRITERS,
        "safetensors",
        lambda classifier, path: export.Exported(lambda x: classifier.model(x) + 1, (0,)),
    )
    assert call(run_folder, "--to", "safetensors", "--out", tmp_path / "x") == 2
    assert "gives other scores: they differ by 1 at (1, 3, 24, 40)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    classifier = load_classifier(run_folder)
    with pytest.raises(ValueError, match="differ by nan"):
        compare(classifier, export.Exported(lambda x: classifier.model(x) * float("nan"), ()))


def test_trace_leaves_the_model_as_it_is(run_folder):
    classifier = load_classifier(run_folder)
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    _, free_axes = trace(classifier)
    assert free_axes == (0, 2, 3) and not classifier.model.training
    assert all(
        torch.equal(value, before[key]) for key, value in classifier.model.state_dict().items()
    )


def test_refusals(run_folder, tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("not weights")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
    assert call(run_folder, "--to", "safetensors", "--out", tmp_path / "whole") == 0
    for words, message in (
        ((tmp_path / "none.ckpt", "--to", "onnx"), "none.ckpt does not exist"),
        ((tmp_path, "--to", "onnx"), "holds no checkpoint"),
        (("timm:resnet18", "--to", "onnx"), "export needs a trained checkpoint"),
        ((run_folder, "--to", "onx"), 'Did you mean "onnx"?'),
        ((tmp_path / "text.safetensors", "--to", "onnx"), "damaged or no safetensors file"),
        ((tmp_path / "bare.safetensors", "--to", "onnx"), "holds weights alone"),
        ((tmp_path / "whole.safetensors", "--to", "safetensors"), "would overwrite"),
    ):
        assert call(*words) == 2
        assert message in capsys.readouterr().err, words


def test_onnx_without_its_packages_says_what_to_install(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert call(run_folder, "--to", "onnx") == 2
    assert (
        "needs onnx, onnxscript, onnxruntime: pip install 'visattn[onnx]'"
        in capsys.readouterr().err
    )


def test_folder_of_the_hub(run_folder, tmp_path):
    classifier = load_classifier(run_folder)
    classifier.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    expected = probabilities(classifier)
    for again in (
        Classifier.from_pretrained(tmp_path / "mine"),
        load_classifier(tmp_path / "mine"),
    ):
        assert (
            again.classes == CLASSES
            and again.transform.config() == TRANSFORM
            and again.network == VIT
        )
        torch.testing.assert_close(probabilities(again), expected, rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"only a classifier that visattn\.load_classifier returned can be saved"
    ):
        Classifier(nn.Identity(), classifier.transform, CLASSES).save_pretrained(tmp_path / "other")


def test_weights_of_another_network_or_version_are_refused(run_folder, tmp_path):
    classifier = load_classifier(run_folder)
    classifier.network = VIT | {"options": {"dim": 32, "depth": 2, "num_heads": 2}}
    classifier.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="do not fit the model 'vit_nano'"):
        load_classifier(tmp_path / "other")
    path = tmp_path / "new.safetensors"
    safetensors.torch.save_file(
        {"a": torch.zeros(2)}, path, metadata={"visattn": json.dumps({"format": 99})}
    )
    with pytest.raises(ValueError, match="has format 99"):
        read_model(path)


def test_from_small_files_over_shards_and_a_training_to_one_file(shapes, tmp_path, capsys):
    assert main(["pack", str(shapes), str(tmp_path / "shards")]) == 0
    cli.main(["fit", *keys(tmp_path / "shards", tmp_path / "run", trainer__max_epochs=1)])
    assert call(tmp_path / "run", "--to", "safetensors", "--out", tmp_path / "carried") == 0
    capsys.readouterr()
    with Image.open(shapes / "val" / "bar" / "00.png") as image:
        expected, got = (
            load_classifier(path)(image)
            for path in (tmp_path / "run", tmp_path / "carried.safetensors")
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert load_classifier(tmp_path / "carried.safetensors").classes == ["bar", "disc", "line"]
