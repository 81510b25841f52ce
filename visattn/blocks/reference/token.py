"""Key maps of branches, context and token blocks: {class: {source: {their prefix: our prefix}}}."""

TOKEN_KEYS = {}
