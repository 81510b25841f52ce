"""`visattn compare`: the same network with several blocks and with none, several seeds each: accuracy, size, time."""

import json
import statistics
from pathlib import Path

import yaml

from visattn.bench.timing import table
from visattn.blocks.catalog import BLOCKS, create_block

HEADER = ("block", "accuracy %", "difference to none", "parameters", "seconds per run", "seeds")


def run(
    config: str,
    /,
    *,
    blocks: str = "",
    seeds: int = 3,
    first_seed: int = 0,
    out: str = "runs/compare",
) -> None:
    """Train one network with each block in its slots, several seeds each, and print an honest table.

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
    options = _chosen(content.pop("blocks", None) or {}, blocks)
    chosen = range(first_seed, first_seed + seeds)
    hosts = {name: _host(content, name, given, Path(out)) for name, given in options.items()}
    # Seed by seed, so that after an interruption all blocks have had about as many.
    for seed in chosen:
        for name, host in hosts.items():
            _train(host, name, seed, Path(out))
    results = {name: [_result(Path(out), name, seed) for seed in chosen] for name in options}
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
            (
                name,
                f"{mean:.2f} ± {spread:.2f}",
                difference,
                f"{runs[0]['parameters']:,}",
                f"{seconds:.0f}",
                len(runs),
            )
        )
    return lines


def _chosen(listed: dict[str, dict | None], blocks: str) -> dict[str, dict]:
    """The names between the commas, or all that the config lists, each once and known, with the config's options."""
    names = list(dict.fromkeys(name.strip() for name in blocks.split(",") if name.strip())) or list(
        listed
    )
    if not names:
        raise ValueError(
            "there is no block to compare: list some under `blocks:` in the config, or give --blocks"
        )
    for name in names:
        if name != "none" and name not in BLOCKS:
            create_block(name, 1)  # raises, with the nearest name
    return {name: listed.get(name) or {} for name in names}


def _host(content: dict, name: str, options: dict, out: Path) -> Path:
    """Write the config of one block's runs, and refuse to mix them with runs of another config."""
    model = dict(content.get("model") or {})
    # a block that the config itself names would stay in the plain network, and its options in all
    # others
    given = {
        key: value
        for key, value in (model.get("options") or {}).items()
        if key not in ("block", "block_options")
    }
    model.pop("block", None)
    if name != "none":
        given |= {"block_options": options} if options else {}
        model["block"] = name
    if given or "options" in model:
        model["options"] = given
    text, path = yaml.safe_dump({**content, "model": model}, sort_keys=False), out / f"{name}.yaml"
    if path.is_file() and path.read_text() != text:
        raise ValueError(
            f"the runs of {name!r} in {out} have another config, {path}; choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-seed{seed}"


def _result(out: Path, name: str, seed: int) -> dict:
    return json.loads((_folder(out, name, seed) / "result.json").read_text())


def _train(config: Path, name: str, seed: int, out: Path) -> None:
    """One run of train.py, unless it has finished before."""
    folder = _folder(out, name, seed)
    if (folder / "result.json").is_file():
        print(f"{folder} has finished before")
        return
    from visattn.training.cli import main

    print(f"{name}, seed {seed}")
    main(
        [
            "fit",
            "--config",
            str(config),
            "--out",
            str(folder),
            "--seed_everything",
            str(seed),
            "--overlays",
            "0",
        ]
    )
