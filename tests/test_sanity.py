"""Measures that explain repeatedly: an intermediate map of zeros is a result, not an error."""

import pytest
import torch
from map_cases import ChannelBrightness
from torch import nn

from visattn import metrics


class OneFeature(nn.Module):
    """The image is the only feature: evidence for class 0 as much as against class 1."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.head = nn.Linear(1, 2, bias=False)
        nn.init.ones_(self.conv.weight)
        self.head.weight.data = torch.tensor([[weight], [-weight]])

    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)))


def test_sanity_counts_a_map_that_has_become_zero():
    """A positive random weight leaves the ranks of the map alone; a negative one empties it."""
    image = torch.rand(1, 1, 5, 7)
    correlations = set()
    for seed in range(8):
        correlation = metrics.sanity(OneFeature(), image, 0, "gradcam", steps=1, seed=seed)
        correlations.add(round(correlation.item(), 4))
    assert correlations == {0, 1}
    with pytest.raises(ValueError, match="gradcam computed a map of zeros"):
        metrics.sanity(OneFeature(-1.0), image, 0, "gradcam")


class BrightOnly(OneFeature):
    """All scores of a dark image are zero."""

    def forward(self, images):
        is_bright = images.mean((1, 2, 3)) > 0.5
        return super().forward(images) * is_bright[:, None]


def test_max_sensitivity_counts_a_map_that_noise_puts_out():
    options = {"target": 0, "method": "gradcam", "radius": 0.02, "samples": 8}
    model = BrightOnly()
    dark = torch.full((1, 1, 4, 4), 0.3)
    barely_bright = torch.full((1, 1, 4, 4), 0.5 + 1e-4)
    # noise empties the map: it changes by all of itself
    assert metrics.max_sensitivity(model, barely_bright, **options).tolist() == [1]
    bright_and_dark = torch.cat([barely_bright + 0.3, dark])
    assert metrics.max_sensitivity(model, bright_and_dark, **options)[1] == 0
    with pytest.raises(ValueError, match="gradcam computed a map of zeros"):
        metrics.max_sensitivity(model, dark, **options)


def test_grid_pointing_gives_an_empty_map_no_share_alone_or_beside_others():
    bright = torch.eye(4)[:, :, None, None].expand(4, 4, 6, 10)
    black = torch.zeros(4, 4, 6, 10)
    images = torch.cat([bright, black])
    target = torch.arange(4).repeat(2)
    model = ChannelBrightness()
    shares = metrics.grid_pointing(model, images, target, "hirescam")
    assert (shares[:4] > 0.8).all()
    assert not shares[4:].any()
    alone = metrics.grid_pointing(model, black, target[4:], "hirescam")
    assert torch.equal(alone, shares[4:])
