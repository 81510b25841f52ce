"""`visattn export CHECKPOINT --to KIND`: a trained classifier in a form that others read, compared with it."""

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from visattn.training.classifier import Classifier, load_classifier
from visattn.training.model_file import write_model

ENDINGS = {"safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-3  # of the largest score: other kernels round otherwise
FREEDOMS = ((0, 2, 3), (0,), ())  # axes of (B, 3, H, W) left open, the most that works
NAMES = {0: "batch", 2: "height", 3: "width"}


def run(
    checkpoint: str,
    /,
    *,
    to: Literal["safetensors", "torch_export", "onnx"],
    out: str | None = None,
) -> None:
    """Write a trained classifier in another form, and compare what that gives with the original.

    safetensors: weights with all that is needed to use them; visattn.load_classifier reads it.
        torch_export: a graph, which
    torch.export.load opens without this package. onnx: a graph for ONNX Runtime and others. Both
    graphs take batches of any size, and images of any size where the network does; they carry class
    names and the transform in their metadata, and their input is what that transform gives.

    Args:
        checkpoint: A run's folder, a checkpoint, or a safetensors file of an earlier export.
        to: The form.
        out: The file to write; its ending may be left out. Default: model.safetensors, .pt2 or
            .onnx beside the run.
    """
    if to == "onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    if checkpoint.startswith("timm:"):
        raise ValueError(f"export needs a trained checkpoint, got {checkpoint}")
    classifier = load_classifier(checkpoint)
    path = _target(checkpoint, to, out)
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        free, again = WRITERS[to](classifier, part)
        worst = compare(classifier, again, free)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    height, width = classifier.transform.image_size
    taken = f"any {', '.join(NAMES[axis] for axis in free)}" if free else "this one size"
    print(
        f"{path} takes (B, 3, {height}, {width}): {taken}; scores differ from the model's by at most {worst:.1e}"
    )


def compare(
    classifier: Classifier, again: Callable[[Tensor], Tensor], free: tuple[int, ...]
) -> float:
    """Return the largest difference of the scores over several shapes; too large a one is an error."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for shape in _shapes(classifier, free):
        images = torch.randn(shape, generator=generator)
        with torch.inference_mode():
            expected, got = classifier.model(images), again(images)
        difference = (expected - got).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ValueError(
                f"the exported model gives other scores: they differ by {difference:.3g} at {shape}"
            )
        worst = max(worst, difference)
    return worst


def _shapes(classifier: Classifier, free: tuple[int, ...]) -> list[tuple[int, ...]]:
    height, width = classifier.transform.image_size
    shapes = [(batch, 3, height, width) for batch in ((1, 2, 5) if 0 in free else (2,))]
    return shapes + [(3, 3, height + 32, width + 64)] * (2 in free)


def _to_safetensors(classifier: Classifier, path: Path) -> tuple[tuple[int, ...], Callable]:
    write_model(path, classifier.model, classifier.note())
    return (0, 2, 3) if _takes_other_sizes(classifier) else (0,), load_classifier(path).model


def _to_torch_export(classifier: Classifier, path: Path) -> tuple[tuple[int, ...], Callable]:
    free, program = trace(classifier)
    torch.export.save(program, path, extra_files={"visattn.json": json.dumps(classifier.note())})
    return free, torch.export.load(path).module()


def _to_onnx(classifier: Classifier, path: Path) -> tuple[tuple[int, ...], Callable]:
    import onnxruntime

    free, program = trace(classifier)
    graph = _translated(program)
    graph.model.metadata_props["visattn"] = json.dumps(classifier.note())
    graph.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return free, lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


WRITERS = {"safetensors": _to_safetensors, "torch_export": _to_torch_export, "onnx": _to_onnx}


def trace(classifier: Classifier) -> tuple[tuple[int, ...], ExportedProgram]:
    """Return the axes that could be left open, and the graph."""
    height, width = classifier.transform.image_size
    for free in FREEDOMS:
        # an unequal size, so that nothing is taken to be square, nor to have the size of training
        size = (height + 32, width + 64) if 2 in free else (height, width)
        shapes = ({axis: Dim.DYNAMIC for axis in free},)
        try:
            with _quiet():
                return free, torch.export.export(
                    classifier.model, (torch.randn(2, 3, *size),), dynamic_shapes=shapes
                )
        except Exception as error:  # torch raises a dozen types for what it cannot trace or a network does not take
            reason = error
    raise ValueError(f"torch.export cannot trace the model: {_first_line(reason)}") from reason


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what torch warns of, logs and prints about its own doings while it traces."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _translated(program: ExportedProgram):
    """The ONNX graph; an operator that ONNX lacks is an error that names the module which uses it."""
    try:
        with _quiet():
            return torch.onnx.export(program, (), dynamo=True, verbose=False)
    except Exception as error:  # of the exporter's own, private types
        raise ValueError(_explained(error, program)) from error


def _explained(error: Exception, program: ExportedProgram) -> str:
    text, link = "", error
    while link is not None:
        text, link = f"{text}\n{link}", link.__cause__
    nodes = {
        node.name: node for node in program.run_decompositions().graph.nodes
    }  # as the exporter saw them
    for name in re.findall(r"translating node %(\w+)", text):
        stack = list(nodes[name].meta.get("nn_module_stack", {}).values()) if name in nodes else []
        if stack:
            place, kind = stack[-1]
            kind = kind if isinstance(kind, str) else kind.__name__
            where = f"{place!r} ({kind.rpartition('.')[2]})"
            return f"ONNX has no operator for {nodes[name].target}, which the module {where} needs"
    return f"ONNX cannot express the model: {_first_line(error)}"


def _takes_other_sizes(classifier: Classifier) -> bool:
    height, width = classifier.transform.image_size
    try:
        with torch.inference_mode():
            classifier.model(torch.zeros(1, 3, height + 32, width + 64))
    except Exception:  # whatever a network raises for a size it does not take
        return False
    return True


def _target(checkpoint: str, to: str, out: str | None) -> Path:
    given, ending = Path(checkpoint), ENDINGS[to]
    if out is None:
        path = given / f"model{ending}" if given.is_dir() else given.with_suffix(ending)
    else:
        path = Path(out) if out.endswith(ending) else Path(out + ending)
    if path.resolve() == given.resolve():
        raise ValueError(f"--out would overwrite {given}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"--to onnx needs {', '.join(missing)}: pip install 'visattn[onnx]'")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
