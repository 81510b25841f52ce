"""The page in a real browser shows what the record holds: offline, escaped, light, dark, small."""

import re
import shutil
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from visattn.core.formula import attention_map
from visattn.core.normalize.exponential import Softmax, Softmax1
from visattn.core.similarity import SIMILARITIES
from visattn.core.similarity.product import ScaledDot
from visattn.draw.page import page as write_page
from visattn.draw.payload import layer_of
from visattn.map import Lattice, Map
from visattn.methods.rollout import rollout
from visattn.record.entry import Record
from visattn.record.space import Space, window_index

GRID = (3, 5)
HEADS = 2
WIDTH = 7
BATCH = 2
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
NASTY = "</script><img src=x onerror=\"document.title='broken'\">&amp;'\"@data@.png"


def token_record(
    name, seed, *, grid=GRID, prefix=2, index=None, lattice=None, sharp=2.0, **options
):
    tokens = prefix + grid[0] * grid[1]
    groups, inside = (1, tokens) if index is None else index.shape
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(BATCH * groups, HEADS, inside, WIDTH, generator=draw) * sharp for _ in "qk")
    space = Space(tokens, prefix, grid, index, lattice)
    return Record(name, "token", BATCH, space, space, q=q, k=k, **options)


def recorded(records):
    """What `capture` gives, made by hand."""
    return SimpleNamespace(
        layers=records, batch=BATCH, select=lambda layers: records, auto_query=lambda record: "cls"
    )


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = next(filter(None, paths), None)
    with sync_api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=QUIET.split())
        except sync_api.Error as error:
            pytest.skip(f"no browser could be started: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Write a page and open it offline; at the end assert no error and no request."""
    contexts = []
    problems = []

    def note_request(request):
        if request.url.startswith("http"):
            problems.append(request.url)

    def opened(records, *, context=None, **options):
        photos = [Image.new("RGB", (250, 150), color) for color in ("navy", "teal")]
        file = write_page(photos, recorded(records), tmp_path / "page.html", **options)
        contexts.append(browser.new_context(offline=True, **(context or {})))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", note_request)
        tab.goto(file.as_uri())
        tab.wait_for_function("state.view")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def click(tab, y, x, grid=GRID):
    box = tab.locator("#stage").bounding_box()
    across = (x + 0.5) / grid[1] * box["width"]
    down = (y + 0.5) / grid[0] * box["height"]
    tab.mouse.click(box["x"] + across, box["y"] + down)


def view_of(tab):
    """The values behind the picture."""
    tab.wait_for_function("document.getElementById('readout').textContent.endsWith('.')")
    view = tab.evaluate("({values: state.view.values, h: state.view.h, w: state.view.w})")
    return np.array(view["values"]).reshape(view["h"], view["w"])


def shown(tab):
    """The values behind the picture, and its pixels."""
    values = view_of(tab)
    pixels = tab.evaluate(
        "(() => { const c = document.getElementById('heat');"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    return values, np.array(pixels).reshape(*values.shape, 4)


def patches(record, token, image=0):
    row = record.row(token)[image].mean(0).detach()
    return row[record.prefix :].unflatten(0, record.grid).numpy()


def choose(tab, **change):
    text = ", ".join(f"{name}: {value}" for name, value in change.items())
    tab.evaluate(f"set({{{text}}})")


def test_a_click_shows_what_the_patch_attends(show):
    records = [token_record("blocks.0", 0), token_record("blocks.1", 1)]
    tab = show(records)
    click(tab, 2, 3)
    values, pixels = shown(tab)
    expected = patches(records[1], 2 + 2 * 5 + 3)
    assert np.allclose(values, expected, atol=expected.max() / 255)
    ramp = np.floor(matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255 + 0.5)
    assert np.array_equal(
        pixels[..., :3], ramp[np.minimum(255, np.floor(values / values.max() * 256)).astype(int)]
    )
    assert (pixels[..., 3] == 255).all()
    marker = tab.locator("#marker").evaluate("e => [e.style.top, e.style.left, e.hidden]")
    assert [float(side[:-1]) for side in marker[:2]] == pytest.approx([200 / 3, 60]) and not marker[
        2
    ]
    best = np.unravel_index(expected.argmax(), GRID)
    text = tab.locator("#readout").text_content()
    assert text.startswith(
        f"patch row 3, column 4 looks most at row {best[0] + 1}, column {best[1] + 1}:"
    )


def test_patches_lie_where_their_lattice_says(show):
    """A click picks the nearest center; the first patch is centered on the picture's corner."""
    record = token_record("attn", 6, lattice=Lattice(0, 0, 1 / 3, 1 / 5))
    heat = Map(torch.rand(BATCH, *GRID), method="gae", lattice=Lattice(0.1, 0.2, 0.2, 0.1))
    tab = show([record], heats={"gae": heat})
    for spot, patch in (
        ((0.1, 0.05), (0, 0)),
        ((0.2, 0.15), (1, 1)),
        ((0.55, 0.72), (2, 4)),
        ((0.99, 0.99), (2, 4)),
    ):
        box = tab.locator("#stage").bounding_box()
        tab.mouse.click(box["x"] + spot[1] * box["width"], box["y"] + spot[0] * box["height"])
        expected = patches(record, 2 + patch[0] * 5 + patch[1])
        assert np.allclose(view_of(tab), expected, atol=expected.max() / 250)
        readout = tab.locator("#readout").text_content()
        assert readout.startswith(f"patch row {patch[0] + 1}, column {patch[1] + 1} looks")
        assert placed(tab, "marker") == pytest.approx(
            [(patch[0] - 0.5) / 3, (patch[1] - 0.5) / 5, 1 / 3, 1 / 5], abs=1e-4
        )
    assert placed(tab, "heat") == pytest.approx([-1.5 / 3, -0.3, 5 / 3, 7 / 5], abs=1e-4)
    pixels = tab.evaluate(
        "[...document.getElementById('heat').getContext('2d').getImageData(0, 0, 7, 5).data]"
    )
    pixels = np.array(pixels).reshape(5, 7, 4)
    assert np.array_equal(pixels, np.pad(pixels[1:-1, 1:-1], ((1, 1), (1, 1), (0, 0)), mode="edge"))
    tab.get_by_role("button", name="gae").click()
    tab.wait_for_function("state.view.high > 0.5")
    assert placed(tab, "heat") == pytest.approx([-0.2, 0.05, 1, 0.7], abs=1e-4)


def placed(tab, name):
    """Top, left, height and width of an element, in shares of the picture."""
    sides = tab.locator(f"#{name}").evaluate(
        "e => ['top', 'left', 'height', 'width'].map(side => e.style[side])"
    )
    return [float(side[:-1]) / 100 for side in sides]


def test_sliders_and_head_thumbnails_choose_layer_and_head(show):
    records = [token_record("blocks.0", 0), token_record("blocks.1", 1)]
    tab = show(records)
    tab.locator("#layer").fill("0")
    tab.locator("#heads button").nth(1).click()
    values, _ = shown(tab)
    expected = records[0].row(0)[0, 1][2:].unflatten(0, GRID).numpy()
    assert np.allclose(values, expected, atol=expected.max() / 250)
    assert "blocks.0" in tab.locator("#layer-name").text_content()
    tab.locator("#head").fill("-1")
    assert np.allclose(shown(tab)[0], patches(records[0], 0), atol=0.004)


def test_hover_shows_and_leaves(show):
    records = [token_record("blocks.0", 0)]
    tab = show(records)
    before, _ = shown(tab)
    box = tab.locator("#stage").bounding_box()
    tab.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    assert np.allclose(shown(tab)[0], patches(records[0], 2 + 4), atol=0.004)
    tab.mouse.move(5, 5)
    assert np.allclose(shown(tab)[0], before)


@pytest.mark.parametrize("most_as_maps", [0, 400], ids=["softmax in the page", "stored maps"])
def test_rollout_in_the_page_is_our_rollout(show, most_as_maps):
    records = [token_record(f"blocks.{i}", i) for i in range(3)]
    tab = show(records, most_tokens_as_maps=most_as_maps)
    assert tab.evaluate("data.layers[0].form") == ("maps" if most_as_maps else "qk")
    tab.get_by_role("button", name="Rollout").click()
    expected = rollout(recorded(records)).values[0].numpy()
    assert np.allclose(shown(tab)[0], expected, atol=0.01 * expected.max())
    tab.locator("#layer").fill("1")
    expected = rollout(recorded(records[:2])).values[0].numpy()
    assert np.allclose(shown(tab)[0], expected, atol=0.01 * expected.max())
    products = [record.weights()[0].mean(0).numpy() / 2 + np.eye(17) / 2 for record in records[:2]]
    product = (products[1] @ products[0])[:, 2:]
    tab.locator("#stage").focus()
    for key, row in (("m", product[2:].mean(0)), ("ArrowUp", product[2 + 1 * 5 + 2])):
        tab.keyboard.press(key)
        assert np.allclose(shown(tab)[0].ravel(), row, atol=0.01 * row.max())


class HalfDot(ScaledDot):
    """A similarity whose inherited inner-product form is not that of its own definition."""

    def forward(self, q, k):
        return 0.5 * super().forward(q, k).abs()


class DoubledDot(ScaledDot):
    """A similarity that changes its inner-product form, and its definition with it."""

    def dot_form(self, q, k):
        return super().dot_form(2 * q, k)


class SquaredSoftmax(Softmax):
    def weights(self, e, count):
        return super().weights(2 * e, count)


class ReversedSoftmax(Softmax):
    def forward(self, e, mask=None):
        return super().forward(-e, mask)


# options of the record, and the form in which a page stores it above the limit
LARGE_LAYERS = {
    "plain": ({}, "qk"),
    "own scale": ({"scale": 0.1}, "qk"),
    "softmax1": ({"pair": (None, Softmax1())}, "maps"),
    "bias": ({"bias": torch.linspace(-2, 2, 17).expand(1, 1, 17, 17)}, "maps"),
    "subclass with its own definition": ({"pair": (HalfDot(WIDTH, HEADS), None)}, "maps"),
    "subclass with its own form": ({"pair": (DoubledDot(WIDTH, HEADS), None)}, "qk"),
    "softmax with its own weights": ({"pair": (None, SquaredSoftmax())}, "maps"),
    "softmax with its own forward": ({"pair": (None, ReversedSoftmax())}, "maps"),
}
for _name, _similarity in SIMILARITIES.items():
    _pair = (_similarity(WIDTH, HEADS), Softmax())
    LARGE_LAYERS[_name] = ({"pair": _pair}, "qk" if _similarity.has_dot_form else "maps")


def weights_of_page(record, layer):
    """The weights (B, H, Nq, Nk) that the page's script computes of what a layer stores."""
    arrays = {name: array.float() for name, array in layer.arrays.items()}
    if layer.facts["form"] == "qk":
        return torch.softmax(arrays["q"] @ arrays["k"].transpose(-2, -1), -1)
    low, reach = arrays["r"].split(1, -1)
    return (low + arrays["a"] / 255 * reach)[:, :, 0]


@pytest.mark.parametrize("case", LARGE_LAYERS)
def test_a_large_layer_stores_its_own_weights(case):
    """Only an inner product with a softmax is stored as such; every other layer stores its maps."""
    options, form = LARGE_LAYERS[case]
    record = token_record("attn", 3, **options)
    layer = layer_of(record, most_tokens_as_maps=3)
    assert layer.facts["form"] == form
    similarity, normalize = record.pair
    expected = attention_map(
        record.q if record.scale is None else record.q * record.scale * WIDTH**0.5,
        record.k,
        similarity,
        normalize,
        bias=record.bias,
    )
    torch.testing.assert_close(weights_of_page(record, layer), expected, atol=0.005, rtol=0)


@pytest.mark.parametrize("case", LARGE_LAYERS)
def test_any_pair_above_the_limit_shows_its_weights(show, case):
    options, form = LARGE_LAYERS[case]
    record = token_record("attn", 3, **options)
    tab = show([record], most_tokens_as_maps=3)
    assert tab.evaluate("data.layers[0].form") == form
    tab.keyboard.press("n")
    click(tab, 0, 2)
    expected = patches(record, 2 + 2, image=1)
    assert np.allclose(shown(tab)[0], expected, atol=0.005 * expected.max())


def test_shifted_windows_with_padding(show):
    index = window_index((3, 5), (2, 2), (1, 1), True)
    record = token_record("windows", 4, prefix=0, index=index)
    tab = show([record, token_record("after", 5, prefix=0)])
    choose(tab, layer=0)
    click(tab, 1, 2)
    expected = patches(record, 1 * 5 + 2)
    assert (expected == 0).any() and np.allclose(shown(tab)[0], expected, atol=0.004)


def test_fewer_keys_than_queries_and_gates(show):
    pooled = Record(
        "pooled",
        "token",
        BATCH,
        Space(15, 0, GRID),
        Space(2, 0, (1, 2)),
        alpha=torch.rand(BATCH, HEADS, 15, 2),
    )
    gate = Record("gate", "spatial", BATCH, Space(0), Space(0), alpha=torch.rand(BATCH, 1, 4, 6))
    tab = show([pooled, gate])
    click(tab, 2, 4)
    assert np.allclose(shown(tab)[0], patches(pooled, 14), atol=0.004)
    assert tab.get_by_role("button", name="Rollout").is_disabled()
    choose(tab, layer=1)
    assert np.allclose(shown(tab)[0], gate.alpha[0, 0].numpy(), atol=1e-6)
    assert tab.locator("#marker").is_hidden()


def test_finished_maps_share_their_scale_over_images(show):
    heat = Map(torch.stack([torch.rand(4, 6), 10 + torch.rand(4, 6)]), method="gae")
    tab = show([token_record("attn", 0)], heats={"gae": heat})
    tab.get_by_role("button", name="gae").click()
    values, _ = shown(tab)
    assert np.allclose(values, heat.values[0].numpy())
    assert tab.evaluate("state.view.high") == pytest.approx(heat.values.max().item())
    tab.locator("#images button").nth(1).click()
    assert np.allclose(shown(tab)[0], heat.values[1].numpy())


def test_keyboard(show):
    records = [token_record("blocks.0", 0), token_record("blocks.1", 1)]
    tab = show(records)
    tab.locator("#stage").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#readout").text_content().startswith("patch row 2, column 4 ")
    for key, name, value in (
        ("[", "layer", 0),
        ("]", "layer", 1),
        (".", "head", 0),
        (",", "head", -1),
        ("n", "image", 1),
    ):
        tab.keyboard.press(key)
        assert tab.evaluate(f"state.{name}") == value
    tab.keyboard.press("r")
    assert tab.evaluate("state.method") == "rollout"
    tab.keyboard.press("a")
    tab.keyboard.press("c")
    assert np.allclose(shown(tab)[0], patches(records[1], 0, image=1), atol=0.004)
    tab.keyboard.press("m")
    mean = np.mean([patches(records[1], token, image=1) for token in range(2, 17)], 0)
    assert np.allclose(shown(tab)[0], mean, atol=0.002)


def test_opacity_and_held_scale(show):
    tab = show([token_record("attn", 0)])
    tab.locator("#opacity").fill("30")
    assert tab.locator("#heat").evaluate("e => getComputedStyle(e).opacity") == "0.3"
    tab.locator("#hold").check()
    high = tab.evaluate("state.view.high")
    click(tab, 1, 1)
    shown(tab)
    assert tab.evaluate("state.view.high") == high


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(show, scheme):
    tab = show([token_record("attn", 0)], context={"color_scheme": scheme})
    background = "getComputedStyle(document.body).backgroundColor"

    def brightness():
        return max(int(value) for value in re.findall(r"\d+", tab.evaluate(background))[:3])

    brightnesses = [brightness()]
    tab.keyboard.press("t")
    brightnesses.append(brightness())
    if scheme == "dark":
        brightnesses.reverse()
    light, dark = brightnesses
    assert light > 200 and dark < 60


def test_on_a_phone(show):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    record = token_record("attn", 0)
    tab = show([record], context=phone)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    box = tab.locator("#stage").bounding_box()
    assert box["width"] > 300
    tab.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.9 * box["height"])
    assert np.allclose(shown(tab)[0], patches(record, 2 + 2 * 5 + 2), atol=0.004)
    buttons = tab.locator("#methods button")
    heights = [button.bounding_box()["height"] for button in buttons.all()]
    assert min(heights) >= 32


def test_names_and_labels_are_text(show):
    record = token_record(NASTY, 0)
    heat = {NASTY: Map(torch.rand(BATCH, 2, 2))}
    tab = show([record], names=[NASTY] * 2, labels=[NASTY] * 2, title=NASTY, heats=heat)
    assert tab.title() == NASTY and tab.locator("h1").text_content() == NASTY
    assert tab.locator("#caption").text_content() == f"{NASTY}: {NASTY}"
    assert tab.locator("img[src=x]").count() == 0


def test_the_file_names_nothing_outside_itself(tmp_path):
    file = write_page(
        torch.zeros(2, 3, 9, 15),
        recorded([token_record("attn", 0)]),
        tmp_path / "new" / "page.html",
    )
    text = file.read_text("utf-8")
    assert not re.findall(r"https?://|@import|src=|url\(", text)


REFUSALS = {
    "images": (
        {},
        [Image.new("RGB", (5, 3))],
        "images must be as many as the recorded images, got 1 and 2",
    ),
    "labels": ({"labels": ["a"]}, None, "labels must be"),
    "heats": ({"heats": {"gae": Map(torch.rand(3, 2, 2))}}, None, "gae must be"),
    "layers": ({"layers": [7]}, None, "layers must be indices below 1, got 7"),
    "colormap": ({"colormap": "infrno"}, None, "did you mean 'inferno'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, case):
    options, images, message = REFUSALS[case]
    images = images or [Image.new("RGB", (5, 3))] * 2
    with pytest.raises(ValueError, match=message):
        write_page(images, recorded([token_record("attn", 0)]), tmp_path / "page.html", **options)


def test_what_cannot_be_shown_is_named(tmp_path):
    photos = [Image.new("RGB", (5, 3))] * 2
    space = Space(15)
    flat = Record("flat", "token", BATCH, space, space, alpha=torch.rand(BATCH, 1, 15, 15))
    with pytest.raises(ValueError, match="got flat \\(token\\)"):
        write_page(photos, recorded([flat]), tmp_path / "page.html")
    broken = token_record("broken", 0)
    broken.q[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="broken holds NaN"):
        write_page(photos, recorded([broken]), tmp_path / "page.html")
    rows = token_record("rows", 0)
    rows.q = rows.k = None
    with pytest.raises(ValueError, match="keep='qk'"):
        write_page(photos, recorded([rows]), tmp_path / "page.html")
