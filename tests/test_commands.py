"""The `visattn` command: what it writes, and one line with exit code 2 for whatever the caller can set right."""

import json
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_cases import untrained_run

import visattn
from visattn.__main__ import BENCHMARKS, COMMANDS, main
from visattn.commands.inputs import ModelSource, open_classifier
from visattn.methods.explain import explain

MODEL = ["--model", "timm:test_vit", "--random"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / "noise.png")
    Image.fromarray(draw.integers(0, 256, (70, 50), np.uint8)).save(folder / "deeper" / "grey.png")
    return folder


@pytest.fixture
def run_folder(tmp_path):
    return untrained_run(tmp_path / "run", ["alpha", "beta", "gamma"])


def call(*arguments):
    return main([str(argument) for argument in arguments])


def test_help_names_every_command(capsys):
    assert call() == call("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text and about in text for name, about in COMMANDS.items())


WORDS = [[name] for name in COMMANDS] + [["bench", name] for name in BENCHMARKS]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_of_the_table_exists_and_explains_its_options(words, capsys):
    assert call(*words, "--help") == 0
    text = capsys.readouterr().out
    assert f"Usage: visattn {' '.join(words)}" in text
    options = re.findall(r"^│[* ]+(--[\w-]+)(.*?)(?=^│[* ]+--|╰)", text, re.MULTILINE | re.DOTALL)
    assert options, "no option"
    for name, line in options:
        described = re.sub(r"\[[^]]*\]|\b[A-Z]{2,}\b|│", "", line)
        assert len(described.split()) >= 2, f"{name} has no help"


def test_the_version_is_the_packages(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == visattn.__version__


def test_a_name_that_does_not_exist_imports_no_command():
    code = (
        "import sys; from visattn.__main__ import main; assert main(['mpa']) == 2; "
        "assert not any(name.startswith('visattn.commands.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_bench_lists_its_parts(capsys):
    assert call("bench") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in BENCHMARKS)
    assert call("bench", "atention") == 2
    assert "did you mean 'attention'" in capsys.readouterr().err


def test_map_writes_pictures_numbers_index_page_and_heads(tmp_path, photos, capsys):
    out = tmp_path / "out"
    assert call("map", photos, *MODEL, "--out", out, "--page", "--grid", "heads") == 0
    index = json.loads((out / "index.json").read_text("utf-8"))
    assert index["method"] == "rollout" and [item["name"] for item in index["images"]] == [
        "grey",
        "noise",
    ]
    classifier = open_classifier(ModelSource("timm:test_vit", random=True))
    with Image.open(photos / "noise.png") as photo:
        image = classifier.transform(photo)
        probabilities = classifier(photo)
    item = index["images"][1]
    assert item["probability"] == pytest.approx(probabilities.max().item(), abs=1e-4)
    assert item["class"] == classifier.classes[probabilities.argmax()]
    assert item["file"] == str(photos / "noise.png")
    with np.load(out / "noise.npz") as raw:
        expected = explain(classifier.model, image[None], method="rollout").values[0]
        assert np.allclose(raw["values"], expected, atol=1e-6)
    for name in ("noise.png", "grey.png", "noise-heads.png", "grey-heads.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    assert "noise.png" in (out / "page.html").read_text("utf-8")
    assert f"{item['class']} {item['probability']:.1%}" in capsys.readouterr().out


def test_maps_do_not_depend_on_the_batch(tmp_path, photos):
    for size in (1, 2):
        call(
            "map",
            photos,
            *MODEL,
            "--method",
            "gae",
            "--out",
            tmp_path / str(size),
            "--batch-size",
            size,
        )
    one, two = (np.load(tmp_path / size / "noise.npz")["values"] for size in "12")
    assert np.allclose(one, two, atol=1e-6 * np.abs(one).max())
    first, second = (json.loads((tmp_path / size / "index.json").read_text()) for size in "12")
    limits = [item["vmax"] for item in first["images"] + second["images"]]
    assert len(limits) == 4 and limits == pytest.approx([limits[0]] * 4, rel=1e-4)


def test_layer_and_head(tmp_path, photos):
    out = tmp_path / "out"
    assert (
        call(
            "map",
            photos / "noise.png",
            *MODEL,
            "--method",
            "raw",
            "--layer",
            0,
            "--head",
            1,
            "--out",
            out,
        )
        == 0
    )
    with np.load(out / "noise.npz") as raw:
        head = raw["values"].copy()
    call("map", photos / "noise.png", *MODEL, "--method", "raw", "--layer", 0, "--out", out)
    with np.load(out / "noise.npz") as raw:
        assert not np.allclose(raw["values"], head)
    assert json.loads((out / "index.json").read_text())["layer"].startswith("blocks.0")


def test_a_run_folder_and_a_target_by_name(tmp_path, photos, run_folder):
    out = tmp_path / "out"
    assert (
        call(
            "map",
            photos,
            "--model",
            run_folder,
            "--method",
            "gae",
            "--target",
            "beta",
            "--out",
            out,
        )
        == 0
    )
    items = json.loads((out / "index.json").read_text("utf-8"))["images"]
    assert {item["class"] for item in items} <= {"alpha", "beta", "gamma"}
    assert [item["target"] for item in items] == [1, 1]
    file = run_folder / "checkpoints" / "best.ckpt"
    assert call("map", photos, "--model", file, "--image-size", 32, "--out", out) == 0
    assert json.loads((out / "index.json").read_text("utf-8"))["images"][0]["shape"] == [4, 4]


def test_weights_from_a_file(tmp_path, photos):
    torch.manual_seed(7)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "out"
    options = ["--model", "timm:test_vit", "--weights", tmp_path / "weights.pt", "--out", out]
    assert call("map", photos / "noise.png", *options) == 0
    transform = open_classifier(ModelSource("timm:test_vit", random=True)).transform
    with Image.open(photos / "noise.png") as photo, torch.no_grad():
        best = model(transform(photo)[None]).softmax(1).max().item()
    assert json.loads((out / "index.json").read_text())["images"][0][
        "probability"
    ] == pytest.approx(best, abs=1e-5)


def test_unreadable_photographs_are_named_and_the_others_done(tmp_path, photos, capsys):
    (photos / "broken.jpg").write_bytes(b"no picture")
    assert call("map", photos, *MODEL, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "broken.jpg" in said.err and "noise.png" in said.out
    assert (tmp_path / "out" / "noise.png").is_file() and (tmp_path / "out" / "grey.png").is_file()


def test_a_network_without_attention_gets_a_cam(tmp_path, photos):
    out = tmp_path / "out"
    assert call("map", photos, "--model", "timm:test_resnet", "--random", "--out", out) == 0
    assert json.loads((out / "index.json").read_text())["method"] == "gradcam"


@pytest.mark.parametrize("extra", [["--page"], ["--grid", "heads"]], ids=" ".join)
def test_what_needs_attention_is_refused_before_anything_is_drawn(tmp_path, photos, capsys, extra):
    out = tmp_path / "out"
    assert call("map", photos, "--model", "timm:test_resnet", "--random", *extra, "--out", out) == 2
    assert f"{' '.join(extra)} needs attention" in capsys.readouterr().err
    assert not list(out.iterdir())


WRONG = {
    "command": (["mpa"], "did you mean 'map'"),
    "option": (
        ["map", "x.png", *MODEL, "--metod", "gae"],
        "Unknown option: --metod. Did you mean --method?",
    ),
    "no model": (["map", "x.png"], "--model requires an argument"),
    "no photograph": (["map", *MODEL], "PHOTOS requires an argument"),
    "number": (
        ["map", "x.png", *MODEL, "--head", "two"],
        '--head: unable to convert "two" into int',
    ),
    "choice": (
        ["map", "x.png", *MODEL, "--blend", "maks"],
        'Choose from: "alpha", "contour", "mask". Did you mean "mask"?',
    ),
    "photograph": (["map", "PHOTOS/nois.png", *MODEL], "did you mean"),
    "empty folder": (["map", "EMPTY", *MODEL], "holds no image"),
    "nothing readable": (["map", "BROKEN", *MODEL], "none of the 1 photographs can be read"),
    "no weights": (
        ["map", "PHOTOS", "--model", "timm:test_vit"],
        "needs one of --pretrained, --weights FILE, --random",
    ),
    "two weights": (["map", "PHOTOS", *MODEL, "--pretrained"], "got --pretrained and --random"),
    "weights file": (
        ["map", "PHOTOS", "--model", "timm:test_vit", "--weights", "no.pt"],
        "there is no file 'no.pt'",
    ),
    "weights that are none": (
        ["map", "PHOTOS", "--model", "timm:test_vit", "--weights", "PHOTOS/noise.png"],
        "noise.png",
    ),
    "weights of another": (
        ["map", "PHOTOS", "--model", "timm:test_vit", "--weights", "OTHER"],
        "does not fit",
    ),
    "timm model": (["map", "PHOTOS", "--model", "timm:test_vti", "--random"], "test_vit"),
    "run": (["map", "PHOTOS", "--model", "RUN/checkpoints/bst.ckpt"], "did you mean"),
    "run and random": (
        ["map", "PHOTOS", "--model", "RUN", "--random"],
        "--random is for timm:NAME",
    ),
    "target": (["map", "PHOTOS", "--model", "RUN", "--target", "bta"], "did you mean 'beta'?"),
    "target number": (["map", "PHOTOS", "--model", "RUN", "--target", "3"], "0 to 2, got '3'"),
    "method": (["map", "PHOTOS", *MODEL, "--method", "rolout"], "rollout"),
    "layer": (["map", "PHOTOS", *MODEL, "--method", "raw", "--layer", "99"], "blocks.0"),
    "head": (["map", "PHOTOS", *MODEL, "--method", "raw", "--head", "99"], "has heads 0 to"),
    "head of a joint method": (
        ["map", "PHOTOS", *MODEL, "--head", "0"],
        "--head is for --method raw",
    ),
    "colormap": (["map", "PHOTOS", *MODEL, "--colormap", "virids"], "did you mean 'viridis'"),
    "no attention": (
        ["map", "PHOTOS", "--model", "timm:test_resnet", "--random", "--method", "gae"],
        "gradcam",
    ),
    "out": (["map", "PHOTOS", *MODEL, "--out", "PHOTOS/noise.png"], "is a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_get_one_line_and_code_2(
    case, tmp_path, photos, run_folder, capsys, monkeypatch
):
    arguments, message = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG")
    if "OTHER" in arguments:
        torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pt")
    places = {
        "PHOTOS": photos,
        "RUN": run_folder,
        "EMPTY": tmp_path / "empty",
        "BROKEN": tmp_path / "broken",
    }
    places["OTHER"] = tmp_path / "other.pt"
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said


def test_what_is_no_users_fault_keeps_its_traceback(monkeypatch):
    def defective(photos: list[str]):
        return photos / 2

    monkeypatch.setattr(import_module("visattn.commands.map"), "run", defective)
    with pytest.raises(TypeError):
        call("map", "x")
