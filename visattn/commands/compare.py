"""`visattn compare`: one network with each of several blocks and with none, over several seeds."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import yaml

from visattn.bench.timing import table
from visattn.blocks.catalog import BLOCKS
from visattn.names import lookup

HEADER = ("block", "accuracy %", "difference to none", "parameters", "seconds per run", "seeds")
PLAIN = "none"  # the network without a block


def run(
    config: str,
    /,
    *,
    blocks: str = "",
    seeds: int = 3,
    first_seed: int = 0,
    out: str = "runs/compare",
) -> None:
    """Train one network with each block in its slots, several seeds each, and print a table.

    Everything but the block and the seed comes from the config. Accuracy is the best epoch's on the
    validation images, mean and standard deviation over the seeds. A run that has finished is not
    run again, so that an interrupted comparison goes on where it stopped.

    Args:
        config: A config of train.py whose model has slots for blocks, and whose key `blocks` lists
            the blocks with their options, such as configs/blocks_compare.yaml.
        blocks: Names of blocks, with commas between, in place of all that the config lists; none is
            the plain network.
        seeds: How many seeds each gets, 2 or more: without a spread there is nothing to compare.
        first_seed: The first of them.
        out: Folder of the runs.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be 2 or more, or the spread is unknown; got {seeds}")
    if not Path(config).is_file():
        raise ValueError(f"there is no config {config!r}")
    content = yaml.safe_load(Path(config).read_text()) or {}
    options = choose_blocks(content.pop("blocks", None) or {}, blocks)
    folder = Path(out)
    configs = {}
    for name, block_options in options.items():
        configs[name] = write_config(content, name, block_options, folder)
    # Seed by seed, so that after an interruption all blocks have about as many runs.
    all_seeds = range(first_seed, first_seed + seeds)
    for seed in all_seeds:
        for name, path in configs.items():
            train(path, run_folder(folder, name, seed), name, seed)
    results = {}
    for name in options:
        results[name] = [read_result(run_folder(folder, name, seed)) for seed in all_seeds]
    print()
    print(table(HEADER, rows(results)))
    print("\n± is one standard deviation over the seeds; a difference within it is none.")


def choose_blocks(listed: dict[str, dict | None], blocks: str) -> dict[str, dict]:
    """Return the options of the blocks between the commas, or of all that the config lists."""
    names = [name.strip() for name in blocks.split(",") if name.strip()] or list(listed)
    if not names:
        raise ValueError(
            "there is no block to compare: list some under `blocks:` in the config, "
            "or give --blocks"
        )
    for name in names:
        if name != PLAIN:
            lookup(BLOCKS, name, "block")
    return {name: listed.get(name) or {} for name in names}


def write_config(content: dict, name: str, block_options: dict, folder: Path) -> Path:
    """Write the config of one block's runs; refuse to mix them with runs of another config."""
    settings = {**content, "model": with_block(content.get("model") or {}, name, block_options)}
    text = yaml.safe_dump(settings, sort_keys=False)
    path = folder / f"{name}.yaml"
    if path.is_file() and path.read_text() != text:
        raise ValueError(
            f"the runs of {name!r} in {folder} have another config, {path}; choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def with_block(model: dict, name: str, block_options: dict) -> dict:
    """Return the keys of a model with this block, or with none."""
    model = dict(model)
    options = dict(model.get("options") or {})
    # A block of the config itself would stay in the plain network, and its options in all others.
    model.pop("block", None)
    options.pop("block", None)
    options.pop("block_options", None)
    if name != PLAIN:
        model["block"] = name
        if block_options:
            options["block_options"] = block_options
    if options or "options" in model:
        model["options"] = options
    return model


def run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-seed{seed}"


def train(config: Path, folder: Path, name: str, seed: int) -> None:
    """Train once as train.py does, unless that run has finished before."""
    if (folder / "result.json").is_file():
        print(f"{folder} has finished before")
        return
    from visattn.training.cli import main

    print(f"{name}, seed {seed}")
    arguments = ["fit", "--config", str(config), "--out", str(folder)]
    main([*arguments, "--seed_everything", str(seed), "--overlays", "0"])


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def rows(results: dict[str, list[dict]]) -> list[tuple]:
    """Return the table's rows: mean and spread over the runs of each block."""
    plain = accuracies(results.get(PLAIN, []))
    lines = []
    for name, runs in results.items():
        accuracy = accuracies(runs)
        mean = statistics.mean(accuracy)
        spread = statistics.stdev(accuracy)
        difference = "-"
        if plain and name != PLAIN:
            pooled = ((spread**2 + statistics.stdev(plain) ** 2) / 2) ** 0.5
            difference = f"{mean - statistics.mean(plain):+.2f} ± {pooled:.2f}"
        parameters = f"{runs[0]['parameters']:,}"
        seconds = statistics.mean(result["seconds"] for result in runs)
        cells = (f"{mean:.2f} ± {spread:.2f}", difference, parameters, f"{seconds:.0f}")
        lines.append((name, *cells, len(runs)))
    return lines


def accuracies(runs: Sequence[dict]) -> list[float]:
    """Return the best validation accuracy of each run in percent."""
    return [100 * result["val_accuracy"] for result in runs]
