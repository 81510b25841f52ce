"""The block that insert builds: the dtype, device and size of the maps that its host gives."""

import pytest
import torch
from surgery_cases import count_hooks, fade_in, image, inserted_names, tiny
from torch import nn

from visattn.blocks.catalog import create_block
from visattn.surgery import insert


def test_a_new_block_has_the_dtype_of_its_host():
    model = insert(tiny().double(), "se")
    assert model.layer1[0].inserted.block.fc1.weight.dtype == torch.float64
    assert type(create_block("se", 8)) is type(model.layer1[0].inserted.block)


HOSTS = {"pool": lambda: nn.MaxPool2d(2), "act": nn.ReLU, "nothing": nn.Identity}


def around(host, **factory):
    """A network in whose middle stands a module without weights."""
    torch.manual_seed(0)
    ends = [nn.Conv2d(*channels, 3, **factory) for channels in ((3, 4), (4, 5))]
    return nn.Sequential(ends[0], HOSTS[host](), ends[1]).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_without_weights_gives_its_block_the_dtype_of_its_map(host, dtype):
    model, x = around(host, dtype=dtype), image().to(dtype)
    before = model(x)
    insert(model, "se", where="1", reduction=2)
    assert {p.dtype for p in model[1].parameters()} == {dtype}
    assert torch.equal(model(x), before)
    assert fade_in(model)(x).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_without_weights_gives_its_block_the_device_of_its_map(host):
    model, x = around(host, device="cuda"), image().cuda()
    before = model(x)
    insert(model, "se", where="1", reduction=2)
    assert all(p.is_cuda for p in model[1].parameters())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("identity", [False, True])
def test_a_block_of_one_size_is_asked_at_the_size_of_its_maps(identity):
    options = {"parameters": "gather", "size": (9, 8), "identity": identity}
    model = insert(tiny(), "ge", where="layer2.*", example=(1, 3, 18, 16), **options)
    assert model(image(2, 3, 18, 16)).isfinite().all()
    model = tiny()
    with pytest.raises(
        ValueError, match=r"maps \(1, 16, 48, 48\).*must be \(B, 16, 9, 8\).*example="
    ):
        insert(model, "ge", where="layer2.*", **options)
    assert not inserted_names(model) and count_hooks(model) == 0
