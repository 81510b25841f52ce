"""What every block weighs, drawn: gates over a picture, channels and branches as bars, what a position attends."""

import re
from pathlib import Path

import pytest
import torch
from block_builds import FIRST, build, inputs
from PIL import Image

import visattn
from visattn.blocks.catalog import BLOCKS
from visattn.core.tap import Tap
from visattn.draw.grids import gate_bars

PHOTO = Image.new("RGB", (44, 28), "white")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROW = r"^\| `(?P<name>\w+)` \| (?P<cls>\w+) \| [^|]+ \| (?P<family>\w+) \| [\d,]+(?: \*)? \| (?P<kinds>[\w, ]+) \|"
ROWS = {row["name"]: row for row in re.finditer(ROW, README, re.MULTILINE)}


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_map_is_captured_by_its_kind_and_drawn(case):
    records = captured(case)
    assert tuple(record.kind for record in records) == case.maps
    for record in records:
        picture = drawn(record).convert("RGB")
        assert picture.getextrema() != ((255, 255),) * 3, record


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_what_is_captured_is_what_is_documented(case):
    kinds = list(dict.fromkeys(record.kind for record in captured(case)))
    entry, row = BLOCKS[case.name], ROWS[case.name]
    assert (row["cls"], row["family"], row["kinds"]) == (
        entry.block.__name__,
        entry.family,
        ", ".join(kinds),
    )
    section = re.search(r"Map:\n(.*?)\n\n", entry.block.__doc__, re.DOTALL)[1]
    assert list(dict.fromkeys(re.findall(rf"kind\s+({'|'.join(Tap.KINDS)})\b", section))) == kinds


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_tap_is_called_tap_or_by_what_it_weighs(case):
    for module in build(case).modules():
        names = [name for name, child in module.named_children() if isinstance(child, Tap)]
        assert all(re.fullmatch(r"tap(_[a-z]+)?", name) for name in names), names


def captured(case):
    """The records of one image."""
    block, tensors = build(case).eval(), inputs(case, batch=1)
    with torch.no_grad(), visattn.capture(block, keep="maps") as maps:
        block(*tensors)
    return maps.layers


def attends(record):
    """Whether the weights are those of queries for keys."""
    return record.kind == "token" or (
        record.kind == "channel" and record.alpha.shape[-2:] != (1, 1)
    )


def drawn(record):
    """The picture of one record: places over a photograph, what are no places as bars."""
    if record.kind == "spatial":
        return visattn.overlay(PHOTO, record.alpha[0].mean(0))
    if record.kind == "branch":
        return gate_bars({record.name: record.alpha[0].flatten(2).mean(2)[..., None, None]})
    if not attends(record):
        return gate_bars({record.name: record.alpha[0]})
    row = (
        record.alpha[0].mean(0)[0]
        if record.kind == "channel"
        else record.row(record.queries.tokens // 2)[0].mean(0)
    )
    if record.grid is None or row.numel() != record.grid[0] * record.grid[1]:
        return gate_bars({record.name: row[:, None, None]})
    return visattn.overlay(PHOTO, row.unflatten(0, record.grid))
