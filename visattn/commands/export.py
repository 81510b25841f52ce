"""`visattn export`: a trained classifier in a form that others read, compared with the original."""

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
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from visattn.training.classifier import Classifier, load_classifier
from visattn.training.model_file import write_model

ENDINGS = {"safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-3  # of the largest score: other kernels round differently
AXIS_NAMES = {0: "batch", 2: "height", 3: "width"}  # of (B, 3, H, W)
FREE_AXES = ((0, 2, 3), (0,), ())  # tried in this order
OTHER_HEIGHT = 32  # pixels more than in training, to try another image size
OTHER_WIDTH = 64


class Exported(NamedTuple):
    """A written model as others run it, and the axes of its input that may have any size."""

    scores: Callable[[Tensor], Tensor]
    free_axes: tuple[int, ...]


def run(
    checkpoint: str,
    /,
    *,
    to: Literal["safetensors", "torch_export", "onnx"],
    out: str | None = None,
) -> None:
    """Write a trained classifier in another form, and compare its scores with the original.

    safetensors: weights with all that is needed to use them; visattn.load_classifier reads it.
    torch_export: a graph, which torch.export.load opens without this package. onnx: a graph for
    ONNX Runtime and others. Both graphs take batches of any size, and images of any size where the
    network does; they carry class names and the transform in their metadata, and their input is
    what that transform gives.

    Args:
        checkpoint: A run's folder, a checkpoint, or a safetensors file of an earlier export.
        to: The form.
        out: The file to write; its ending may be left out. Default: model.safetensors, .pt2 or
            .onnx beside the run.
    """
    if to == "onnx":
        require_packages("onnx", "onnxscript", "onnxruntime")
    if checkpoint.startswith("timm:"):
        raise ValueError(f"export needs a trained checkpoint, got {checkpoint}")
    classifier = load_classifier(checkpoint)
    path = target_path(checkpoint, to, out)
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        exported = WRITERS[to](classifier, partial)
        difference = compare(classifier, exported)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    height, width = classifier.transform.image_size
    sizes = "this one size"
    if exported.free_axes:
        sizes = f"any {', '.join(AXIS_NAMES[axis] for axis in exported.free_axes)}"
    print(
        f"{path} takes (B, 3, {height}, {width}): {sizes}; "
        f"scores differ from the model's by at most {difference:.1e}"
    )


def require_packages(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(f"--to onnx needs {', '.join(missing)}: pip install 'visattn[onnx]'")


def target_path(checkpoint: str, to: str, out: str | None) -> Path:
    source = Path(checkpoint)
    ending = ENDINGS[to]
    if out is not None:
        path = Path(out) if out.endswith(ending) else Path(out + ending)
    elif source.is_dir():
        path = source / f"model{ending}"
    else:
        path = source.with_suffix(ending)
    if path.resolve() == source.resolve():
        raise ValueError(f"--out would overwrite {source}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def compare(classifier: Classifier, exported: Exported) -> float:
    """Return the largest difference of the scores over several shapes; refuse too large a one."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in trial_shapes(classifier, exported.free_axes):
        images = torch.randn(shape, generator=generator)
        with torch.inference_mode():
            expected = classifier.model(images)
            scores = exported.scores(images)
        difference = (expected - scores).abs().max().item()
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= limit:  # a NaN is refused as well
            raise ValueError(
                f"the exported model gives other scores: they differ by {difference:.3g} at {shape}"
            )
        largest = max(largest, difference)
    return largest


def trial_shapes(classifier: Classifier, free_axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    height, width = classifier.transform.image_size
    batch_sizes = (1, 2, 5) if 0 in free_axes else (2,)
    shapes: list[tuple[int, ...]] = [(batch, 3, height, width) for batch in batch_sizes]
    if 2 in free_axes:
        shapes.append((3, 3, height + OTHER_HEIGHT, width + OTHER_WIDTH))
    return shapes


def write_safetensors(classifier: Classifier, path: Path) -> Exported:
    write_model(path, classifier.model, classifier.note())
    free_axes = (0, 2, 3) if takes_other_sizes(classifier) else (0,)
    return Exported(load_classifier(path).model, free_axes)


def takes_other_sizes(classifier: Classifier) -> bool:
    height, width = classifier.transform.image_size
    images = torch.zeros(1, 3, height + OTHER_HEIGHT, width + OTHER_WIDTH)
    try:
        with torch.inference_mode():
            classifier.model(images)
    except Exception:  # networks raise anything for a size that they do not take
        return False
    return True


def write_torch_export(classifier: Classifier, path: Path) -> Exported:
    program, free_axes = trace(classifier)
    notes = {"visattn.json": json.dumps(classifier.note())}
    torch.export.save(program, path, extra_files=notes)
    return Exported(torch.export.load(path).module(), free_axes)


def write_onnx(classifier: Classifier, path: Path) -> Exported:
    import onnxruntime

    program, free_axes = trace(classifier)
    graph = translate_to_onnx(program)
    graph.model.metadata_props["visattn"] = json.dumps(classifier.note())
    graph.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name

    def scores(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {input_name: images.numpy()})[0])

    return Exported(scores, free_axes)


WRITERS = {
    "safetensors": write_safetensors,
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}


def trace(classifier: Classifier) -> tuple[ExportedProgram, tuple[int, ...]]:
    """Return the graph of the network, and the axes that could be left open."""
    height, width = classifier.transform.image_size
    for free_axes in FREE_AXES:
        images = torch.randn(2, 3, height, width)
        if 2 in free_axes:
            # Not the size of training, and not square: the graph must not fix either.
            images = torch.randn(2, 3, height + OTHER_HEIGHT, width + OTHER_WIDTH)
        dynamic_shapes = ({axis: Dim.DYNAMIC for axis in free_axes},)
        try:
            with without_messages():
                program = torch.export.export(
                    classifier.model, (images,), dynamic_shapes=dynamic_shapes
                )
            return program, free_axes
        except Exception as error:
            # torch raises a dozen types for what it cannot trace or a network does not take.
            reason = error
    raise ValueError(f"torch.export cannot trace the model: {first_line(reason)}") from reason


@contextmanager
def without_messages() -> Iterator[None]:
    """Silence what torch warns of, logs and prints about its own work while it traces."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)


def translate_to_onnx(program: ExportedProgram):
    """Return the ONNX graph; the error for a missing operator names the module that uses it."""
    try:
        with without_messages():
            return torch.onnx.export(program, (), dynamo=True, verbose=False)
    except Exception as error:  # the exporter's types are private
        raise ValueError(explain_onnx_error(error, program)) from error


def explain_onnx_error(error: Exception, program: ExportedProgram) -> str:
    # The graph as the exporter saw it: its messages name nodes of the decomposed program.
    nodes = {node.name: node for node in program.run_decompositions().graph.nodes}
    for name in re.findall(r"translating node %(\w+)", chained_text(error)):
        if name not in nodes:
            continue
        modules = list(nodes[name].meta.get("nn_module_stack", {}).values())
        if modules:
            path, module_type = modules[-1]
            if not isinstance(module_type, str):
                module_type = module_type.__name__
            module = f"{path!r} ({module_type.rpartition('.')[2]})"
            return f"ONNX has no operator for {nodes[name].target}, which the module {module} needs"
    return f"ONNX cannot express the model: {first_line(error)}"


def chained_text(error: BaseException | None) -> str:
    """Return the messages of an error and of those that caused it."""
    lines = []
    while error is not None:
        lines.append(str(error))
        error = error.__cause__
    return "\n".join(lines)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
