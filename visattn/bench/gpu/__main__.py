"""``python -m visattn.bench.gpu``: the command without the packages of the command line."""

import argparse
import sys

from visattn.bench.gpu import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m visattn.bench.gpu", description=(run.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", default="bench-gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time after which no further section is begun"
    )
    sys.exit(run(**vars(parser.parse_args())))
