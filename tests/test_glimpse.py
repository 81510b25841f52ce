"""The glimpse model: one map per glimpse, and characters read one after another."""

import copy
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visattn.core.formula import Attend
from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES
from visattn.models.cnn import ResNet, ResNetConfig
from visattn.models.glimpse import GlimpseClassifier, GlimpseReader, Glimpses
from visattn.models.presets import create_model
from visattn.record import capture

SIZE, GRID = (20, 28), (5, 7)
TINY = ResNetConfig("cifar", "basic", (1, 1, 1), (4, 4, 8))
ARCHIVE = Path(__file__).parents[1] / "assets" / "writing_systems.zip"


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def looks(dim=12, glimpses=3, **options):
    return Glimpses(ResNet(TINY, 0), dim, glimpses=glimpses, **options)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return GlimpseClassifier(looks(**options), 12, 5).eval()


def test_equals_its_twin():
    """The equations once more, step by step, with a GRU written out."""
    model, x = build().glimpses.double(), images(2, 3, *SIZE).double()
    w = dict(model.named_parameters())
    with torch.no_grad():
        h = model.proj(model.features.forward_features(x)).flatten(2).transpose(1, 2)
        waves = []
        for i in range(GRID[0]):
            for j in range(GRID[1]):
                angles = [
                    np.pi * 2**k * (at + 0.5) / n for at, n in ((i, 5), (j, 7)) for k in range(4)
                ]
                y, x_ = angles[:4], angles[4:]
                waves.append([*np.sin(y), *np.cos(y), *np.sin(x_), *np.cos(x_)])
        h = h + torch.tensor(np.array(waves)) @ w["place.weight"].T
        state, seen = torch.tanh(h.mean(1) @ w["start.weight"].T + w["start.bias"]), []
        f_sim = model.attend.similarity
        for _ in range(3):
            hidden = torch.tanh(state[:, None] @ f_sim.query_weight[0] + h @ f_sim.key_weight[0])
            alpha = (hidden @ f_sim.score_weight[0]).softmax(1)
            context = (alpha * h).sum(1)
            a = (context @ w["cell.weight_ih"].T + w["cell.bias_ih"]).chunk(3, 1)
            b = (state @ w["cell.weight_hh"].T + w["cell.bias_hh"]).chunk(3, 1)
            r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            state = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * state
            seen.append(torch.cat([state, context], 1))
        torch.testing.assert_close(model(x), torch.stack(seen, 1), rtol=1e-6, atol=1e-6)


def test_capture_gives_a_map_per_glimpse():
    model, x = build(), images(2, 3, *SIZE)
    with capture(model) as maps:
        model(x)
    assert len(maps.layers) == 3 and all(
        record.kind == "token" and record.grid == GRID for record in maps.layers
    )
    for glimpse in range(3):
        heat = maps.map(layer=glimpse)
        assert heat.values.shape == (2, *GRID)
        torch.testing.assert_close(heat.values.sum((1, 2)), torch.ones(2))
    assert not torch.allclose(maps.map(layer=0).values, maps.map(layer=2).values)


def test_maps_act():
    model, x, calls = build(), images(2, 3, *SIZE), []

    def flip_last(module, inputs, output):
        calls.append(output)
        return output.flip(-1) if len(calls) == 3 else output

    before = model(x)
    handle = model.glimpses.attend.register_forward_hook(flip_last)
    assert not torch.allclose(model(x), before) and len(calls) == 3
    handle.remove()


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (31, 17), (24, 96)])
def test_any_image_size(size):
    y = build()(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_repeats_images_do_not_mix_and_copies():
    model, x = build(), images(2, 3, *SIZE)
    y, fresh = model(x), build(seed=1)
    fresh.load_state_dict(model.state_dict())
    for twin in (model, copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model))), fresh):
        assert torch.equal(twin(x), y)
    torch.testing.assert_close(model(x[1:]), y[1:], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.1)
    assert model.to("meta")(torch.empty(2, 3, *SIZE, device="meta")).is_meta


def test_every_parameter_learns():
    model = build()
    torch.nn.functional.cross_entropy(model(images(2, 3, *SIZE)), torch.tensor([1, 4])).backward()
    for key, parameter in model.named_parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        ), key


def test_exports_with_any_batch():
    model, dynamic = build(), ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(
        model, (images(2, 3, *SIZE),), dynamic_shapes=dynamic, strict=False
    )
    x = images(3, 3, *SIZE, seed=1)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "similarity, normalize", [("scaled_dot", "sparsemax"), ("cosine", "sigmoid"), (None, None)]
)
def test_pairs_by_name(similarity, normalize):
    model = create_model(
        "glimpse", num_classes=3, dim=16, glimpses=2, similarity=similarity, normalize=normalize
    )
    attend = next(module for module in model.modules() if isinstance(module, Attend))
    assert type(attend.similarity) is SIMILARITIES[similarity or "additive"]
    assert normalize is None or type(attend.normalize) is NORMALIZERS[normalize]
    assert model(images(2, 3, 16, 16)).shape == (2, 3)


def test_lengths_mask_the_loss():
    torch.manual_seed(0)
    reader = GlimpseReader(looks(), 12, 5)
    scores, labels, lengths = images(2, 3, 6), torch.tensor([[1, 4], [2, 3]]), torch.tensor([2, 1])
    loss = reader.loss(scores, labels, lengths)
    log = scores.log_softmax(-1)
    expected = -(log[0, 0, 1] + log[0, 1, 4] + log[0, 2, 5] + log[1, 0, 2] + log[1, 1, 5]) / 5
    torch.testing.assert_close(loss, expected)
    assert reader.loss(scores, torch.tensor([[1, 4], [2, 0]]), lengths) == loss


def test_reading_stops_at_the_mark():
    reader = GlimpseReader(looks(), 12, 5)
    best = torch.tensor([[1, 5, 2], [0, 4, 3], [5, 1, 1]])
    assert reader.read(torch.nn.functional.one_hot(best, 6).float()) == [[1], [0, 4, 3], []]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: looks(glimpses=0), "glimpses must be at least 1; got 0"),
        (
            lambda: create_model("glimpse", features="resnet9"),
            "unknown features 'resnet9'; did you mean 'resnet8'",
        ),
        (
            lambda: GlimpseReader(looks(), 12, 5).loss(
                images(1, 3, 6), torch.tensor([[1, 2]]), torch.tensor([3])
            ),
            r"lengths must lie in 0 to 2; got \[3\]",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def characters(size, each=2):
    """Return (writing system, square drawing) of a few embedded characters, ink as ones."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = sorted(
            n for n in archive.namelist() if n.startswith("train/") and n.endswith(".png")
        )
        systems = sorted({name.split("/")[1] for name in names})
        chosen = [
            (i, n)
            for i, s in enumerate(systems)
            for n in [n for n in names if n.split("/")[1] == s][:each]
        ]
        drawings = [
            Image.open(io.BytesIO(archive.read(name))).convert("L").resize((size, size))
            for _, name in chosen
        ]
    ink = [
        1 - torch.from_numpy(np.asarray(drawing, dtype=np.float32)) / 255 for drawing in drawings
    ]
    return [(system, drawing) for (system, _), drawing in zip(chosen, ink, strict=True)]


def rows_of(drawings, size, count, generator):
    """Return images of 2 to 4 characters in a row, their writing systems and how many they are."""
    lengths = torch.randint(2, 5, (count,), generator=generator)
    x, labels = torch.zeros(count, 1, size, 4 * size), torch.zeros(count, 4, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        for place, c in enumerate(
            torch.randint(len(drawings), (length,), generator=generator).tolist()
        ):
            labels[row, place] = drawings[c][0]
            x[row, 0, :, place * size : (place + 1) * size] = drawings[c][1]
    return x, labels, lengths


def test_reads_characters_in_a_row():
    """After a short training new rows of known characters are read, and the glimpses go from left to right."""
    torch.manual_seed(0)
    size, steps, generator = 16, 110, torch.Generator().manual_seed(0)
    drawings = characters(size)
    features = ResNet(ResNetConfig("cifar", "basic", (1, 1, 1), (16, 32, 32)), 0, in_channels=1)
    reader = GlimpseReader(Glimpses(features, 48, glimpses=5), 48, 5)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        x, labels, lengths = rows_of(drawings, size, 32, generator)
        loss = reader.loss(reader(x), labels, lengths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    reader.eval()
    x, labels, lengths = rows_of(drawings, size, 64, generator)
    with torch.no_grad(), capture(reader) as maps:
        read = reader.read(reader(x))
    right = [r == l[:n].tolist() for r, l, n in zip(read, labels, lengths, strict=True)]
    assert sum(right) >= 60, f"{sum(right)} of 64 rows were read"
    columns = torch.arange(16.0)
    centers = torch.stack(
        [(maps.map(layer=t).values.sum(1) * columns).sum(1) for t in range(4)], dim=1
    )
    four = centers[lengths == 4]
    assert (four.diff(dim=1) > 0).float().mean() > 0.9, "glimpses do not go from left to right"
