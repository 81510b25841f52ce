"""Key maps of the gates over positions and strips: {class: {source: {their prefix: our prefix}}}."""

SPATIAL_KEYS = {}
