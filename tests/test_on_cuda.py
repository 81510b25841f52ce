"""On a CUDA device: blocks, models and maps give there what they give on the CPU. Without a GPU all are skipped."""

import copy
import csv

import pytest
import timm
import torch
from block_builds import FIRST, build, inputs
from journey_cases import command, run_to_the_end, small_options
from torch.nn.attention import SDPBackend, sdpa_kernel

from visattn.methods.gradient import gae
from visattn.methods.rollout import rollout
from visattn.models.presets import create_model
from visattn.record import capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def outcome(module, tensors, device):
    """Return output and input gradients on a device, carried back to the CPU."""
    module, leaves = (
        copy.deepcopy(module).to(device),
        [x.to(device).requires_grad_() for x in tensors],
    )
    output = module(*leaves)
    gradients = torch.autograd.grad(
        output.square().sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return [x.detach().cpu() for x in (output, *gradients)]


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
def test_blocks_give_there_what_they_give_here(case):
    block, tensors = build(case, torch.float64).eval(), inputs(case, dtype=torch.float64)
    for got, wanted in zip(
        outcome(block, tensors, DEVICE), outcome(block, tensors, "cpu"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "entmax15"])
def test_a_vit_gives_there_what_it_gives_here(normalize):
    torch.manual_seed(0)
    model, images = create_model("vit_nano", normalize=normalize).eval(), torch.randn(2, 3, 48, 48)
    for got, wanted in zip(
        outcome(model, [images], DEVICE), outcome(model, [images], "cpu"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_maps_do_not_depend_on_the_backend_of_attention(backend):
    torch.manual_seed(0)
    model, images = timm.create_model("test_vit", img_size=48).eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad(), capture(model) as maps:
        model(images)
    wanted = rollout(maps).values, gae(model, images, 3).values
    model, images = model.to(DEVICE, torch.bfloat16), images.to(DEVICE, torch.bfloat16)
    with sdpa_kernel(backend):
        with torch.no_grad(), capture(model) as maps:
            model(images)
        found = rollout(maps).values, gae(model, images, 3).values
    assert len(maps.layers) == len(model.blocks)
    for got, want in zip(found, wanted, strict=True):
        correlation = torch.corrcoef(torch.stack([got.cpu().flatten(), want.flatten()]))[0, 1]
        assert correlation > 0.9


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_the_quickstart_learns_in_bfloat16(tmp_path, strategy):
    options = {
        "trainer__accelerator": "auto",
        "trainer__precision": "bf16-mixed",
        "trainer__limit_train_batches": 60,
    }
    run_to_the_end(
        command("fit", *small_options(tmp_path / "run", trainer__strategy=strategy, **options))
    )
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert len(losses) == 2 and losses[1] < losses[0]
