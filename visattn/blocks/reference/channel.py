"""Key maps of the gates over channels: {class: {source: {their prefix: our prefix}}}."""

CHANNEL_KEYS = {
    "SqueezeExcite": {
        "paper": {"fc.0": "fc1", "fc.2": "fc2"},
        "timm": {},
    },
}
