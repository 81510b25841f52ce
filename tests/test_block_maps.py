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
    assert tuple(record.kind for record in maps.layers) == case.maps
    for record in maps.layers:
        picture = drawn(record)
        assert any(low < high for low, high in picture.convert("RGB").getextrema()), record


def drawn(record):
    """The picture of one record: places over a photograph, what are no places as bars."""
    if record.kind in ("channel", "branch"):
        return gate_bars({record.name: record.alpha[0].flatten(2).mean(2)[..., None, None]})
    if record.kind == "spatial":
        return visattn.overlay(PHOTO, record.alpha[0].mean(0))
    row = record.row(record.queries.tokens // 2)[0].mean(0)
    if record.grid is None or row.numel() != record.grid[0] * record.grid[1]:
        return gate_bars({record.name: row[:, None, None]})
    return visattn.overlay(PHOTO, row.unflatten(0, record.grid))
