"""The subcommands of `visattn`: one module each, with a typed function `run`."""
