"""`visattn bench WHAT`: the measurements live in visattn/bench, one module with a function `run` each."""

PARTS = {
    "attention": "every similarity x normalizer: how it is evaluated, and what that costs",
    "blocks": "every block: time, memory, parameters",
    "maps": "rollout, GAE and class-token rows against eager capture",
    "gpu": "attention, maps, training steps and gates on a GPU, with a report; says so where there is none",
    "data": "images/s that one core reads and augments, and the start with many files",
    "train": "fit against a plain training loop, and the own ViT against timm's",
}
