"""`visattn compare`: the same network with several blocks and with none, several seeds each: accuracy, size, time."""

import json
import statistics
from pathlib import Path

from visattn.bench.timing import table
from visattn.blocks.table import BLOCKS, create_block

HEADER = ("block", "accuracy %", "difference to none", "parameters", "seconds per run", "seeds")


def run(
    config: str,
    *,
    blocks: str = "none,se,eca,cbam,coord,simam,gc",
    seeds: int = 3,
    first_seed: int = 0,
    out: str = "runs/compare",
) -> None:
    """Train one network with each block in its slots, several seeds each, and print an honest table.

    Everything but the block and the seed comes from the config. Accuracy is the best epoch's on the validation images,
    mean and standard deviation over the seeds. A run that has finished is not run again, so that an interrupted
    comparison goes on where it stopped.

    Args:
        config: A config of train.py whose model has slots for blocks, such as configs/blocks_compare.yaml.
        blocks: Names of blocks, with commas between; none is the plain network.
        seeds: How many seeds each gets, 2 or more: without a spread there is nothing to compare.
        first_seed: The first of them.
        out: Folder of the runs.
    """
    names = _named(blocks)
    if seeds < 2:
        raise ValueError(f"seeds must be 2 or more, or the spread is unknown; got {seeds}")
    if not Path(config).is_file():
        raise ValueError(f"there is no config {config!r}")
    chosen = range(first_seed, first_seed + seeds)
    # Seed by seed, so that after an interruption all blocks have had about as many.
    for seed in chosen:
        for name in names:
            _train(config, name, seed, Path(out))
    results = {name: [_result(Path(out), name, seed) for seed in chosen] for name in names}
    print()
    print(table(HEADER, rows(results)))
    print("\n± is one standard deviation over the seeds; a difference within it is none.")


def rows(results: dict[str, list[dict]]) -> list[tuple]:
    """The table's rows: mean and spread of what the runs of each block say."""
    plain = [100 * result["val_accuracy"] for result in results.get("none", [])]
    lines = []
    for name, runs in results.items():
        accuracy = [100 * result["val_accuracy"] for result in runs]
        mean, spread = statistics.mean(accuracy), statistics.stdev(accuracy)
        difference = "-"
        if plain and name != "none":
            pooled = ((spread**2 + statistics.stdev(plain) ** 2) / 2) ** 0.5
            difference = f"{mean - statistics.mean(plain):+.2f} ± {pooled:.2f}"
        seconds = statistics.mean(result["seconds"] for result in runs)
        lines.append(
            (name, f"{mean:.2f} ± {spread:.2f}", difference, f"{runs[0]['parameters']:,}", f"{seconds:.0f}", len(runs))
        )
    return lines


def _named(blocks: str) -> list[str]:
    """The names between the commas, each once and known."""
    names = list(dict.fromkeys(name.strip() for name in blocks.split(",") if name.strip()))
    if not names:
        raise ValueError("blocks must name at least one block")
    for name in names:
        if name != "none" and name not in BLOCKS:
            create_block(name, 1)  # raises, with the nearest name
    return names


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-seed{seed}"


def _result(out: Path, name: str, seed: int) -> dict:
    return json.loads((_folder(out, name, seed) / "result.json").read_text())


def _train(config: str, name: str, seed: int, out: Path) -> None:
    """One run of train.py, unless it has finished before."""
    folder = _folder(out, name, seed)
    if (folder / "result.json").is_file():
        print(f"{folder} has finished before")
        return
    from visattn.training.cli import main

    print(f"{name}, seed {seed}")
    arguments = ["fit", "--config", config, "--out", str(folder), "--seed_everything", str(seed), "--overlays", "0"]
    main(arguments + ([] if name == "none" else ["--model.block", name]))
