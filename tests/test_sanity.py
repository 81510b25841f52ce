"""Measures that explain again and again: a map of zeros on the way is a finding, not the end."""

import pytest
import torch
from test_metrics import Corner
from torch import nn

from visattn import metrics


class OneFeature(nn.Module):
    """The image itself is the only feature; it speaks for class 0 by as much as against class 1."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 2, bias=False)
        nn.init.ones_(self.conv.weight)
        self.head.weight.data = torch.tensor([[weight], [-weight]])

    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)))


def test_sanity_counts_a_map_that_has_become_zero():
    """A random weight leaves the map's ranks as they are where it is positive, and nothing where it is negative."""
    image = torch.rand(1, 1, 5, 7)
    found = [
        metrics.sanity(OneFeature(), image, 0, "gradcam", steps=1, seed=seed).item()
        for seed in range(8)
    ]
    assert {round(alike, 4) for alike in found} == {0, 1}
    with pytest.raises(ValueError, match="gradcam computed a map of zeros"):
        metrics.sanity(OneFeature(-1.0), image, 0, "gradcam")


class Lit(OneFeature):
    """Of dark images it says nothing."""

    def forward(self, images):
        return super().forward(images) * (images.mean((1, 2, 3)) > 0.5)[:, None]


def test_max_sensitivity_counts_a_map_that_noise_puts_out():
    options = {"target": 0, "method": "gradcam", "radius": 0.02, "samples": 8}
    dark, edge = torch.full((1, 1, 4, 4), 0.3), torch.full((1, 1, 4, 4), 0.5 + 1e-4)
    assert metrics.max_sensitivity(Lit(), edge, **options).tolist() == [1]  # all of it gone
    assert metrics.max_sensitivity(Lit(), torch.cat([edge + 0.3, dark]), **options)[1] == 0
    with pytest.raises(ValueError, match="gradcam computed a map of zeros"):
        metrics.max_sensitivity(Lit(), dark, **options)


def test_grid_pointing_gives_an_empty_map_no_share_alone_or_beside_others():
    bright = torch.eye(4)[:, :, None, None].expand(4, 4, 6, 10)
    images, target = torch.cat([bright, torch.zeros(4, 4, 6, 10)]), torch.arange(4).repeat(2)
    both = metrics.grid_pointing(Corner(), images, target, "hirescam")
    assert (both[:4] > 0.8).all() and not both[4:].any()
    assert torch.equal(
        metrics.grid_pointing(Corner(), images[4:], target[4:], "hirescam"), both[4:]
    )
