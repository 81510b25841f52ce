"""The host networks: their shapes, their slot for a block, torchvision's weights."""

from inspect import signature

import pytest
import torch
import torchvision
from model_cases import NARROW_BLOCK_OPTIONS

from visattn.blocks.catalog import BLOCKS
from visattn.models.cnn import CNNS, CONVOLUTIONS, ResNet, ResNetConfig, build_resnet

TINY = ResNetConfig("cifar", "basic", (1, 1), (8, 16))
NECK = ResNetConfig("cifar", "bottleneck", (1, 2), (8, 16))


@pytest.mark.parametrize("name", CNNS)
def test_depth_is_in_the_name(name):
    config = CNNS[name]
    layers = sum(config.depths) * (3 if config.unit == "bottleneck" else 2) + 2
    assert layers == int(name.removeprefix("resnet").removesuffix("_wide"))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvision_weights_load_strictly(name):
    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, name)(), build_resnet(config=CNNS[name])
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }


def test_equal_to_torchvision():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    ours = build_resnet(config=CNNS["resnet18"], num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 45, 37)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (1, 13), (31, 17)])
@pytest.mark.parametrize("config", [TINY, NECK], ids=["basic", "bottleneck"])
def test_any_size(config, size):
    model = ResNet(config, 5, in_channels=1).eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 5)
    assert ResNet(config, 0, in_channels=1).eval()(torch.randn(2, 1, *size)).shape == (
        2,
        model.num_features,
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_trains_in_the_slot(block):
    if len(signature(BLOCKS[block].block.forward).parameters) > 2:
        pytest.skip("takes two maps")
    torch.manual_seed(0)
    model = ResNet(NECK, 5, block=block, block_options=NARROW_BLOCK_OPTIONS.get(block)).train()
    loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 13, 11)), torch.arange(4))
    loss.backward()
    kind = BLOCKS[block].block
    units = [unit for stage in model.stages for unit in getattr(model, stage)]
    placed = [
        isinstance(unit.conv2 if block in CONVOLUTIONS else unit.slot, kind) for unit in units
    ]
    # A block keeps the size, so the convolution that strides stays where a block would take its
    # place.
    assert placed == ([True, False, True] if block in CONVOLUTIONS else [True, True, True])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.conv1.weight.grad.abs().max() > 0


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="unknown block 'cbm'"):
        build_resnet(config=CNNS["resnet8"], block="cbm")


def test_learns_four_images():
    torch.manual_seed(0)
    model = ResNet(TINY, 4, block="se", block_options={"reduction": 4}).train()
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
