"""What insert and replace refuse, and that a refusal leaves the network as it was."""

import pytest
from surgery_cases import TINY, count_hooks, inserted_names, takes_many, tiny
from torch import nn

from visattn.blocks.catalog import BLOCKS
from visattn.models.cnn import ResNet
from visattn.surgery import insert, replace


def test_refusals():
    with pytest.raises(
        ValueError, match=r"where='layer9.\*' matches no module.*known: conv1.*layer1"
    ):
        insert(tiny(), "se", where="layer9.*")
    with pytest.raises(ValueError, match=r"did you mean 'layer1.0'"):
        insert(tiny(), "se", where="layr1.0")
    with pytest.raises(
        ValueError, match=r"'after:Bottleneck' matches no module.*class: .*known: .*BasicUnit"
    ):
        insert(tiny(), "se", where="after:Bottleneck")
    with pytest.raises(ValueError, match=r"'fc' must give a map \(B, C, H, W\).*gives \(1, 5\)"):
        insert(tiny(), "se", where="fc")
    with pytest.raises(ValueError, match=r"unknown block 'sse'; did you mean .*'se'"):
        insert(tiny(), "sse")
    with pytest.raises(ValueError, match=r"has no layer 'se'.*attention layers in it: none"):
        replace(tiny(), "se", "se")
    model = insert(tiny(), "se", where="layer1.0")
    with pytest.raises(ValueError, match=r"'layer1.0' has an inserted block"):
        insert(model, "se", where="blocks")
    assert inserted_names(model) == ["layer1.0.inserted"]


def test_a_refused_insert_changes_nothing():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), Pair(), nn.Conv2d(4, 4, 3)).eval()
    for model, where, options, message in (
        (tiny(), "blocks", {"reduction": 0}, "reduction"),
        (other, "1.dict", {}, r"'1.dict' runs its own children"),
    ):
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            insert(model, "se", where=where, **options)
        assert (
            list(model.state_dict()) == keys
            and not inserted_names(model)
            and count_hooks(model) == 0
        )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.dict = Layers({"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)})

    def forward(self, x):
        return self.dict(x)


class Layers(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("block", [name for name in BLOCKS if takes_many(name)])
def test_a_block_of_many_maps_is_refused_everywhere(block):
    model = ResNet(TINY, 5, block="se").eval()
    layers = list(model.modules())
    for change in (lambda: insert(model, block), lambda: replace(model, "se", block)):
        with pytest.raises(ValueError, match=f"{block!r} takes 2 maps"):
            change()
    assert list(model.modules()) == layers
