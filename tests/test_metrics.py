"""The measures against loops, and against maps whose truth is known."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from map_cases import ChannelBrightness
from torch import nn

from visattn import metrics
from visattn.map import Map
from visattn.methods.explain import explain


class Bright(nn.Module):
    """Two classes: class 1 scores the mean of the top left quarter, class 0 its negative."""

    def forward(self, images):
        height, width = images.shape[2] // 2, images.shape[3] // 2
        score = 4 * images[:, :, :height, :width].mean((1, 2, 3))
        return torch.stack([-score, score], 1)


def _scene():
    torch.manual_seed(0)
    images = torch.rand(3, 2, 8, 12) + 0.5
    heat = torch.rand(3, 4, 6)
    return Bright(), images, heat


def _curve(model, images, before, after, order, target, counts):
    """Return the probabilities of one image and one step at a time."""
    curve = np.zeros((len(images), len(counts)))
    for b in range(len(images)):
        pixels = sorted(range(order[b].numel()), key=lambda i: -order[b].flatten()[i].item())
        for s, count in enumerate(counts):
            x = before[b].flatten(1).clone()
            x[:, pixels[:count]] = after[b].flatten(1)[:, pixels[:count]]
            curve[b, s] = model(x.view(1, *images.shape[1:])).softmax(1)[0, target[b]].item()
    return curve


def _area(curves):
    """Return the mean height of each curve by the trapezoid rule."""
    heights = (curves[:, 1:] + curves[:, :-1]) / 2
    return heights.mean(1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_deletion_and_insertion_step_by_step(batch_size):
    model, images, values = _scene()
    order = F.interpolate(values[:, None], (8, 12), mode="bilinear", align_corners=False)[:, 0]
    counts = [round(step * 96 / 10) for step in range(11)]
    blank = torch.full_like(images, 0.25)
    expected = _curve(model, images, images, blank, order, [1, 1, 1], counts)
    curve = metrics.deletion(
        model,
        images,
        Map(values),
        steps=10,
        baseline=0.25,
        batch_size=batch_size,
        return_curve=True,
    )
    np.testing.assert_allclose(curve.numpy(), expected, rtol=1e-5)
    area = metrics.deletion(model, images, values, steps=10, baseline=0.25, batch_size=batch_size)
    np.testing.assert_allclose(area.numpy(), _area(expected), rtol=1e-5)

    blurred = _blur(images.numpy())
    expected = _curve(model, images, torch.from_numpy(blurred), images, order, [0, 1, 0], counts)
    curve = metrics.insertion(model, images, values, torch.tensor([0, 1, 0]), 10, return_curve=True)
    np.testing.assert_allclose(curve.numpy(), expected, rtol=1e-4)
    area = metrics.insertion(model, images, values, torch.tensor([0, 1, 0]), 10)
    np.testing.assert_allclose(area.numpy(), _area(expected), rtol=1e-4)


def _blur(images: np.ndarray) -> np.ndarray:
    out = np.zeros_like(images)
    for y in range(images.shape[2]):
        for x in range(images.shape[3]):
            total = 0
            for dy in range(-5, 6):
                for dx in range(-5, 6):
                    weight = np.exp(-(dy**2 + dx**2) / 50)
                    # beyond the border the nearest pixel counts
                    from_y = min(max(y + dy, 0), images.shape[2] - 1)
                    from_x = min(max(x + dx, 0), images.shape[3] - 1)
                    out[:, :, y, x] += weight * images[:, :, from_y, from_x]
                    total += weight
            out[:, :, y, x] /= total
    return out


def test_a_true_map_beats_a_false_one():
    model, images, _ = _scene()
    true = torch.zeros(3, 8, 12)
    true[:, :4, :6] = 1
    for positive in (True, False):
        true_score = metrics.perturbation(model, images, true, positive=positive)
        false_score = metrics.perturbation(model, images, -true, positive=positive)
        assert ((true_score < false_score) == positive).all()
    assert (metrics.deletion(model, images, true) < metrics.deletion(model, images, -true)).all()


def test_perturbation_counts_when_the_class_stays_first():
    model, images, _ = _scene()
    heat = torch.arange(96.0).view(1, 8, 12).repeat(3, 1, 1)
    images[:, :, :4, :6] = 1
    # the coldest pixel counts against class 1, which is first only when it is gone
    images[1, :, 0, 0] = -40
    curve = metrics.perturbation(model, images, heat, 1, positive=False, return_curve=True)
    expected = np.zeros((3, 9))
    for b in range(3):
        for s, share in enumerate(np.linspace(0.1, 0.9, 9)):
            x = images[b : b + 1].clone().flatten(2)
            x[:, :, : round(share * 96)] = 0
            expected[b, s] = model(x.view(1, 2, 8, 12)).argmax(1).item() == 1
    np.testing.assert_array_equal(curve.numpy(), expected)
    area = metrics.perturbation(model, images, heat, 1, positive=False)
    np.testing.assert_allclose(area.numpy(), _area(expected), rtol=1e-6)


def _masks():
    truth = torch.zeros(2, 10, 13, dtype=torch.bool)
    truth[0, 2:5, 3:7] = True
    truth[1, 8:, 9:] = True
    return truth


def test_pointing_game():
    truth, heat = _masks(), torch.zeros(2, 10, 13)
    heat[0, 4, 9] = 1  # three pixels to the right of the object
    heat[1, 5, 5] = 1  # three up, four left: five away
    for tolerance, hits in ((2.9, [0, 0]), (3, [1, 0]), (4.99, [1, 0]), (5, [1, 1])):
        assert metrics.pointing_game(heat, truth, tolerance).tolist() == hits
    assert torch.equal(
        metrics.boxes_to_masks(torch.tensor([[3, 2, 7, 5], [9, 8, 13, 10]]), (10, 13)), truth
    )


def test_energy_and_segmentation_pixel_by_pixel():
    torch.manual_seed(0)
    truth, heat = _masks(), torch.randn(2, 10, 13)
    heat[0, 0, :3] = heat[0, 2, 3]  # equal values inside and outside
    measures = metrics.segmentation(heat, truth)
    energy = metrics.energy_pointing(heat, truth)
    for b in range(2):
        inside = total = right = 0
        overlaps = {True: [0, 0], False: [0, 0]}  # intersection and union
        mean = heat[b].mean().item()
        for value, true in zip(
            heat[b].flatten().tolist(), truth[b].flatten().tolist(), strict=True
        ):
            inside += max(value, 0) * true
            total += max(value, 0)
            guess = value > mean
            right += guess == true
            for label in (True, False):
                overlaps[label][0] += guess == label and true == label
                overlaps[label][1] += guess == label or true == label
        assert energy[b].item() == pytest.approx(inside / total, rel=1e-5)
        assert measures.pixel_accuracy[b].item() == pytest.approx(right / 130)
        assert measures.iou[b].item() == pytest.approx(sum(i / u for i, u in overlaps.values()) / 2)
        precision, last = 0.0, 0.0
        for level in sorted(set(heat[b].flatten().tolist()), reverse=True):
            guess = heat[b] >= level
            hits = (guess & truth[b]).sum().item()
            recall = hits / truth[b].sum().item()
            precision += (recall - last) * hits / guess.sum().item()
            last = recall
        assert measures.average_precision[b].item() == pytest.approx(precision, rel=1e-5)
    perfect = metrics.segmentation(truth.float(), truth)
    assert all(values.tolist() == [1, 1] for values in perfect)


def test_grid_pointing():
    model = ChannelBrightness()
    target = torch.tensor([2, 0, 3, 1, 1, 3, 0, 2])
    images = torch.zeros(8, 4, 6, 10)
    for b, c in enumerate(target):
        images[b, c] = 1
    shares = metrics.grid_pointing(model, images, target, "hirescam", shrink=False)
    torch.testing.assert_close(shares, torch.ones(8))
    shrunk = metrics.grid_pointing(model, images, target, "hirescam")
    assert (shrunk > 0.8).all(), "shrinking blurs the seam, no more"
    flat = torch.ones(8, 4, 6, 10)
    shares = metrics.grid_pointing(model, flat, target, "hirescam", shrink=False)
    torch.testing.assert_close(shares, torch.full((8,), 0.25))
    with pytest.raises(ValueError, match="four different classes"):
        metrics.grid_pointing(model, images, torch.zeros(8), "hirescam")
    with pytest.raises(ValueError, match=r"images must come in fours, with one class each; got 3"):
        metrics.grid_pointing(model, images[:3], target[:3], "hirescam")


def test_rank_correlation():
    torch.manual_seed(0)
    a, b = torch.rand(2, 4, 5), torch.rand(2, 4, 5)
    a[0, 0] = 0.5  # ties
    for i in range(2):
        ranks = []
        for values in (a[i].flatten().tolist(), b[i].flatten().tolist()):
            ranks.append(
                [
                    np.mean([j + 1 for j, v in enumerate(sorted(values)) if v == value])
                    for value in values
                ]
            )
        expected = np.corrcoef(*ranks)[0, 1]
        assert metrics.rank_correlation(a, b)[i].item() == pytest.approx(expected, abs=1e-6)
    assert metrics.rank_correlation(a, a.exp()).tolist() == pytest.approx([1, 1])
    assert metrics.rank_correlation(a, torch.ones_like(a)).tolist() == [0, 0]


@pytest.fixture(scope="module")
def trained():
    """A CNN that has learned to name the brighter half, so that its weights mean something."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
    )
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        images = torch.rand(16, 1, 8, 12)
        labels = (images[..., 6:].mean((1, 2, 3)) > images[..., :6].mean((1, 2, 3))).long()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), torch.rand(4, 1, 8, 12)


def test_sanity_falls_and_leaves_the_model_alone(trained):
    model, images = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fall = metrics.sanity(model, images, method="hirescam", layers="2", steps=3)
    assert fall.shape == (3, 4) and fall[-1].mean() < 0.8
    assert torch.equal(fall, metrics.sanity(model, images, method="hirescam", layers="2", steps=3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        metrics.sanity(model, images, method="hirescam", steps=0)


def test_max_sensitivity_is_the_largest_change(trained):
    model, images = trained
    target = model(images).argmax(1)
    first = explain(model, images, target, "layercam", layers="2").values.flatten(1)
    generator = torch.Generator().manual_seed(3)
    worst = torch.zeros(4)
    for _ in range(4):
        noise = (torch.rand(images.shape, generator=generator) * 2 - 1) * 0.1
        moved = explain(model, images + noise, target, "layercam", layers="2").values.flatten(1)
        worst = torch.maximum(worst, (moved - first).norm(dim=1) / first.norm(dim=1))
    options = {"method": "layercam", "layers": "2", "samples": 4, "seed": 3}
    torch.testing.assert_close(metrics.max_sensitivity(model, images, radius=0.1, **options), worst)
    assert (metrics.max_sensitivity(model, images, radius=0.01, **options) < worst).all()
    with pytest.raises(ValueError, match="radius must be positive"):
        metrics.max_sensitivity(model, images, radius=0, method="layercam")


def test_bad_input():
    model, images, values = _scene()
    with pytest.raises(
        ValueError, match=r"heat must be one map per image, \(3, h, w\); got \(2, 4, 6\)"
    ):
        metrics.deletion(model, images, values[:2])
    with pytest.raises(ValueError, match="heat must be finite"):
        metrics.insertion(model, images, values * torch.nan)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        metrics.deletion(model, images, values, steps=0)
    with pytest.raises(ValueError, match=r"target must lie in 0 to 1; got \[2\]"):
        metrics.deletion(model, images, values, 2)
    with pytest.raises(ValueError, match="this measure needs a probability"):
        metrics.deletion(model, images, values, lambda output: output[:, 0])
    with pytest.raises(
        ValueError, match=r"truth must be bool masks \(B, H, W\); got \(2, 10, 13\) torch.int64"
    ):
        metrics.pointing_game(values[:2], _masks().long())
    with pytest.raises(ValueError, match=r"truth must mark something in every image; empty: \[1\]"):
        metrics.energy_pointing(values[:2], _masks() & torch.tensor([True, False])[:, None, None])
    for measure in (metrics.sanity, metrics.max_sensitivity, metrics.grid_pointing):
        with pytest.raises(ValueError, match="images must hold at least one image"):
            measure(model, images[:0], torch.zeros(0, dtype=torch.long))


def test_the_model_stays_as_it_was(trained):
    model, images = copy.deepcopy(trained)
    model.train()
    metrics.deletion(model, images, torch.rand(4, 2, 3))
    assert model.training and all(p.requires_grad for p in model.parameters())
