"""CAM methods and integrated gradients against slow twins."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_cases import SmallCNN, exact
from torch import nn

from visattn.methods.explain import explain

CAMS = ("gradcam", "gradcam++", "hirescam", "layercam", "eigencam")


def _cam_twins(features: np.ndarray, gradient: np.ndarray) -> dict:
    """One image, (C, h, w), by loops over channels."""
    channels, height, width = features.shape
    out = {name: np.zeros((height, width)) for name in CAMS}
    for f, g in zip(features, gradient, strict=True):
        out["gradcam"] += g.mean() * f
        out["hirescam"] += g * f
        out["layercam"] += np.maximum(g, 0) * f
        below = 2 * g**2 + f.sum() * g**3
        alpha = np.where(below == 0, 0, g**2 / np.where(below == 0, 1, below))
        out["gradcam++"] += (alpha * np.maximum(g, 0)).sum() * f
    for name in ("gradcam", "gradcam++", "layercam"):
        out[name] = np.maximum(out[name], 0)
    flat = features.reshape(channels, -1).T
    values, vectors = np.linalg.eigh(flat.T @ flat)
    first = flat @ vectors[:, values.argmax()]
    out["eigencam"] = (first * np.sign(first.sum())).reshape(height, width)
    return out


@pytest.mark.parametrize("method", CAMS)
def test_cams_on_a_cnn(method):
    torch.manual_seed(0)
    model = SmallCNN().eval().double()
    images = torch.randn(3, 3, 21, 29, dtype=torch.double)
    features = model.body(F.relu(model.stem(images))).detach().requires_grad_()
    logits = model.head(F.relu(features).mean((2, 3)))
    logits[:, 1].sum().backward()
    heat = explain(model, images, 1, method)
    assert heat.layer == "body"
    for b in range(3):
        expected = _cam_twins(features[b].detach().numpy(), features.grad[b].numpy())[method]
        np.testing.assert_allclose(heat.values[b].numpy(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", CAMS)
def test_cams_on_tokens(method):
    """After the last block only the class token is read, so the features are that block's input."""
    model, _, images, _ = exact("timm_dinov2_registers")
    x = model._pos_embed(model.patch_embed(images))
    x = model.blocks[0](model.norm_pre(x)).detach().requires_grad_()
    model.forward_head(model.norm(model.blocks[1](x)))[:, 2].sum().backward()
    heat = explain(model, images, 2, method)
    assert heat.layer == "blocks.1 (input)"
    for b in range(2):
        features = _feature_map(x.detach()[b])
        gradient = _feature_map(x.grad[b])
        expected = _cam_twins(features, gradient)[method]
        np.testing.assert_allclose(
            heat.values[b].numpy(), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
        )


def _feature_map(tokens: torch.Tensor) -> np.ndarray:
    """Return the patches behind 5 prefix tokens as a picture: (26, C) -> (C, 3, 7)."""
    return tokens[5:].T.reshape(-1, 3, 7).double().numpy()


def test_hirescam_is_exact_for_a_linear_head():
    torch.manual_seed(0)
    model, images = SmallCNN().eval(), torch.randn(3, 3, 21, 29)
    total = explain(model, images, 1, "hirescam").values.sum((1, 2))
    torch.testing.assert_close(total, (model(images)[:, 1] - model.head.bias[1]).detach())


def test_cams_take_a_layer_by_name():
    torch.manual_seed(0)
    model, images = SmallCNN().eval(), torch.randn(3, 3, 21, 29)
    assert explain(model, images, 1, "layercam", layers="stem").values.shape == (3, 11, 15)
    with pytest.raises(
        ValueError, match="layers must be the name of one module; got 'stemm'; did you mean 'stem'"
    ):
        explain(model, images, 1, "gradcam", layers="stemm")
    with pytest.raises(ValueError, match="the output of 'head' is no feature map"):
        explain(model, images, 1, "gradcam", layers="head")


class Turned(nn.Module):
    """Returns a view of its input, and something else beside it."""

    def forward(self, x):
        return x.transpose(2, 3), x.shape


class Rewriting(nn.Module):
    """What follows a layer writes into what the layer returned, or makes a new tensor."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace
        self.stem = nn.Conv2d(3, 5, 3, 2, 1)
        self.body = nn.Conv2d(5, 5, 3, 1, 1)
        self.norm = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace)
        self.last = nn.Conv2d(5, 7, 3, 2, 1)
        self.turned = Turned()
        self.head = nn.Linear(7, 4)

    def forward(self, images):
        shortcut = self.relu(self.stem(images))
        x = self.norm(self.body(shortcut))
        x = x.add_(shortcut) if self.inplace else x + shortcut
        x, _ = self.turned(self.last(self.relu(x)))
        x = F.relu(x, self.inplace)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("layers", ["stem", "norm", "relu", "last", "turned", None])
@pytest.mark.parametrize("method", CAMS)
def test_later_operations_in_place_leave_a_layer_what_it_was(method, layers):
    torch.manual_seed(0)
    plain = Rewriting(False).eval().double()
    images = torch.randn(3, 3, 21, 29, dtype=torch.double)
    rewriting = Rewriting(True).eval().double()
    rewriting.load_state_dict(plain.state_dict())
    expected = explain(plain, images, 1, method, layers)
    heat = explain(rewriting, images, 1, method, layers)
    assert heat.layer == expected.layer == (layers or "last")
    torch.testing.assert_close(heat.values, expected.values)


def test_a_layer_whose_output_nobody_reads_is_still_explained():
    """In place, a module can act without its output being used."""

    class Ignoring(SmallCNN):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, images):
            x = self.stem(images)
            self.relu(x)
            return self.head(F.relu(self.body(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Ignoring().eval(), torch.randn(2, 3, 21, 29)
    features = F.relu(model.stem(images)).detach().requires_grad_()
    model.head(F.relu(model.body(features)).mean((2, 3)))[:, 1].sum().backward()
    expected = (features * features.grad).sum(1).detach()
    torch.testing.assert_close(
        explain(model, images, 1, "hirescam", layers="relu").values, expected
    )


def test_integrated_gradients_is_a_sum_along_the_line():
    pytest.importorskip("captum")
    torch.manual_seed(0)
    model, images = SmallCNN().eval().double(), torch.randn(2, 3, 13, 11, dtype=torch.double)
    target = torch.tensor([3, 0])
    heat = explain(model, images, target, "integrated_gradients")
    along = (torch.arange(200, dtype=torch.double) + 0.5) / 200
    for b in range(2):
        line = (along.view(-1, 1, 1, 1) * images[b]).requires_grad_()
        (gradient,) = torch.autograd.grad(model(line)[:, target[b]].sum(), line)
        expected = (images[b] * gradient.mean(0)).sum(0).float()
        assert (heat.values[b] - expected).abs().max() < 0.02 * expected.abs().max()
    change = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(
        heat.values.sum((1, 2)), change.detach().float(), atol=1e-3, rtol=1e-2
    )
