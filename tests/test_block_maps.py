"""What every block weighs, drawn: gates over a picture, channels and branches as bars, what a position attends."""

import pytest
import torch
from block_builds import FIRST, build, inputs
from PIL import Image

import visattn
from visattn.draw.grids import gate_bars

PHOTO = Image.new("RGB", (44, 28), "white")


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_map_is_captured_by_its_kind_and_drawn(case):
    block, tensors = build(case).eval(), inputs(case, batch=1)
    with torch.no_grad(), visattn.capture(block, keep="maps") as maps:
        block(*tensors)
    # Where channels attend channels, the record says so.
    assert tuple("token" if attends(record) else record.kind for record in maps.layers) == case.maps
    for record in maps.layers:
        picture = drawn(record).convert("RGB")
        assert picture.getextrema() != ((255, 255),) * 3, record


def attends(record):
    """Whether the weights are those of queries for keys."""
    return record.kind == "token" or (record.kind == "channel" and record.alpha.shape[-2:] != (1, 1))


def drawn(record):
    """The picture of one record: places over a photograph, what are no places as bars."""
    if record.kind == "spatial":
        return visattn.overlay(PHOTO, record.alpha[0].mean(0))
    if record.kind == "branch":
        return gate_bars({record.name: record.alpha[0].flatten(2).mean(2)[..., None, None]})
    if not attends(record):
        return gate_bars({record.name: record.alpha[0]})
    row = record.alpha[0].mean(0)[0] if record.kind == "channel" else record.row(record.queries.tokens // 2)[0].mean(0)
    if record.grid is None or row.numel() != record.grid[0] * record.grid[1]:
        return gate_bars({record.name: row[:, None, None]})
    return visattn.overlay(PHOTO, row.unflatten(0, record.grid))
