"""visattn: attention for images. One formula, proven blocks, and maps that were tested for truth."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_HOME = {
    "BLOCKS": "blocks.catalog",
    "METHODS": "methods.explain",
    "MODELS": "models.presets",
    "NORMALIZERS": "core.normalize",
    "RELATIONS": "core.attention",
    "SIMILARITIES": "core.similarity",
    "Classifier": "training.classifier",
    "ImageData": "data.module",
    "Map": "map",
    "Maps": "record",
    "Plan": "core.formula",
    "Record": "record",
    "attend": "core.formula",
    "attention_map": "core.formula",
    "capture": "record",
    "create_block": "blocks.catalog",
    "create_model": "models.presets",
    "explain": "methods.explain",
    "insert": "surgery",
    "load_classifier": "training.classifier",
    "load_reference": "blocks.reference",
    "overlay": "draw.overlay",
    "page": "draw.page",
    "plan": "core.formula",
    "remove": "surgery",
    "replace": "surgery",
    "rollout": "methods.rollout",
    "save_maps": "draw.files",
}

__all__ = [*_HOME, "metrics"]

try:
    __version__ = version("visattn")
except PackageNotFoundError:
    __version__ = "unknown"


def __getattr__(name: str):
    """Import a public name on first use (PEP 562), so that `import visattn` costs `import torch`."""
    if name == "metrics":
        return import_module("visattn.metrics")
    if name not in _HOME:
        raise AttributeError(f"module 'visattn' has no attribute {name!r}")
    value = getattr(import_module(f"visattn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
