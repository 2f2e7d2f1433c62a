"""The report's page: what it says, that it says nothing it should not, and that it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.markup import Html, element, joined
from fxmerge.matchers import Average, PLeaS, WeightMatching
from fxmerge.page.figures import ticks
from fxmerge.page.picture import picture
from fxmerge.page.words import amount
from fxmerge.size import sizes

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
HOSTILE = "</script><img src=x onerror=alert(1)>"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 2, seed: int = 0, hidden: str = "blocks") -> None:
        super().__init__()
        self.hidden = hidden
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.add_module(hidden, nn.Sequential(*(Block(8) for _ in range(depth))))
        randomise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, self.hidden)(self.stem(x)))


def merged(*models: nn.Module, **options: Any) -> fxmerge.MergeResult:
    return fxmerge.merge(*models, **{"example_inputs": X[:2], "progress": False, **options})


@pytest.fixture(scope="module")
def pair() -> fxmerge.MergeResult:
    """The second network is the deeper one, and gives the result its layers."""
    return merged(Net(1), Net(3, 1), data=[X])


@pytest.fixture(scope="module")
def barrier() -> fxmerge.Barrier:
    return fxmerge.evaluate_barrier(Net(), Net(seed=1), [(X, X[:, 0].gt(0).long())], points=3, progress=False)


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# Markup -----------------------------------------------------------------------------------------------------


def test_what_is_not_markup_is_escaped():
    inside = element("b", "<i>", title='"&')
    assert inside == '<b title="&quot;&amp;">&lt;i&gt;</b>'
    assert element("p", inside, None, 3, class_=None) == f"<p>{inside}3</p>"
    assert joined(["<", Html("<")]) == "&lt;<"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (999, "999"), (999.6, "1.00 k"), (11_689_512, "11.7 M"), (2e15, "2.00 P"), (1.5, "1.50")],
)
def test_amounts(value, said):
    assert amount(value) == said


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.307, 2.3141), (-3e-5, 4e-5), (17, 9000)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in found)
    step = found[1] - found[0]
    assert float(f"{step:.0e}") == pytest.approx(step)


# Sizes ------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_networks(pair):
    first, second, result = pair.report.sizes
    for size, depth in ((first, 1), (second, 3), (result, 3)):
        weights = 5 * 8 + depth * 2 * 8 * 16 + 8 * 3
        assert size.flops == 2 * 2 * weights  # two samples
        assert size.parameters == weights + 8 + depth * 24 + 3
        assert size.bytes == 4 * size.parameters


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("module", "shape", "flops"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5), 2 * 2 * 25 * 4 * 27),
        (nn.LSTM(8, 16, batch_first=True), (2, 5, 8), 2 * 10 * (8 + 16) * 64),
        (Attention(), (2, 5, 8), 2 * 10 * 4 * 64 + 2 * (2 * 2 * 2 * 25 * 4)),
    ],
)
def test_operations_of_one_run(module, shape, flops):
    enabled, fast = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    (size,) = sizes([module.eval()], (torch.randn(shape),), {})
    assert size.flops == flops
    assert (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()) == (enabled, fast)


def test_what_cannot_be_counted_is_left_open():
    (size,) = sizes([nn.Linear(5, 3)], (torch.randn(2, 4),), {})
    assert size == (type(size))(18, 72, None)
    assert amount(size.flops) == "not counted"


# Data of the picture ----------------------------------------------------------------------------------------


def walked(tree: list[Any]) -> Iterator[int]:
    for entry in tree:
        if isinstance(entry, int):
            yield entry
        else:
            assert len(entry["items"]) > 1
            yield from walked(entry["items"])


def groups(tree: list[Any]) -> dict[str, Any]:
    found = {}
    for entry in tree:
        if isinstance(entry, dict):
            found |= {entry["path"]: entry, **groups(entry["items"])}
    return found


def test_the_tree_follows_the_modules(pair):
    data = picture(pair.report)
    assert list(walked(data["tree"])) == list(range(len(data["nodes"])))
    found = groups(data["tree"])
    assert list(found) == ["blocks", "blocks.0", "blocks.1", "blocks.2"]
    assert [data["nodes"][i]["label"] for i in found["blocks.1"]["items"]] == ["up", "relu", "down", "add"]
    assert found["blocks.1"]["parameters"] == 2 * 8 * 16 + 24


def test_parents_are_told_in_the_order_in_which_they_were_given(pair):
    data = picture(pair.report)
    inserted = {n["target"]: n["inserted"] for n in data["nodes"] if n["target"]}
    assert inserted["stem"] == []
    lacking = {name.rpartition(".")[0] for name, who in inserted.items() if who}
    assert all(who in ([], [0]) for who in inserted.values())
    units = {name: group["units"] for name, group in groups(data["tree"]).items() if group["units"]}
    assert {name for name, who in units.items() if who[0].startswith("inserted")} == lacking
    assert len(lacking) == 2
    assert [who for name, who in units.items() if name not in lacking] == [["blocks.0", None]]


@pytest.mark.parametrize("parents", [2, 3])
def test_neurons_kept_apart_are_counted(parents):
    models = [Net(seed=s) for s in range(parents)]
    report = merged(*models, data=[X], matcher=PLeaS(ratios={"blocks.0": 0.5})).report
    k = next(k for k, c in enumerate(report.classes) if c.name == "blocks.0.up.weight:0")
    everyone = tuple(range(parents))
    assert report.shared[k] == {everyone: 8, **{(p,): 8 for p in everyone}}
    assert report.widths(k) == (16,) * parents
    for shared, coupling in zip(report.shared, report.alignment.couplings, strict=True):
        assert sum(shared.values()) == coupling.size
    known = picture(report)["classes"][k]
    assert known["shared"] == [[list(everyone), 8], *([[p], 8] for p in everyone)]
    node = next(n for n in picture(report)["nodes"] if n["target"] == "blocks.0.up")
    assert node["shape"] == (2, 8 * (parents + 1))


def test_a_node_says_which_neurons_its_tensors_carry(pair):
    data = picture(pair.report)
    up = next(n for n in data["nodes"] if n["target"] == "blocks.1.up")
    name = {k: c["name"] for k, c in enumerate(data["classes"])}
    assert [name[k] for k, _ in up["classes"]] == ["blocks.1.up.weight:0"]
    found = {site: (name[k], reads) for site, k, reads in up["sites"]}
    assert found["blocks.1.up.weight:1"] == ("stem.weight:0", True)
    assert found["blocks.1.up.bias:0"] == ("blocks.1.up.weight:0", False)


# The page as text -------------------------------------------------------------------------------------------


def test_the_page_is_complete_and_needs_nothing_else(pair, barrier):
    html = pair.report.html(barrier)
    assert html == pair.report.html(barrier)
    namespace = "http://www.w3.org/2000/svg"
    assert not re.search(r"https?://|\bsrc=|@import|url\(", html.replace(namespace, ""))
    assert "default-src 'none'" in html
    for title in ("Networks", "The fused network", "Layers side by side", "Pinned, and why", "Repair", "Time"):
        assert f">{title}</h2>" in html, title
    assert "inserted: passes on what it reads" in html
    assert "relative error" in html
    assert f"{barrier.loss[1]:.5g}" in html
    assert "Between the two networks" not in pair.report.html()


def test_the_page_is_written(pair, barrier, tmp_path):
    path = pair.report.to_html(tmp_path / "page.html", barrier)
    assert path.read_text(encoding="utf-8") == pair.report.html(barrier)
    folder = pair.save(tmp_path / "saved", barrier=barrier)
    assert (folder / "report.html").read_text(encoding="utf-8") == pair.report.html(barrier)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_pages_without_data_checks_or_matches_are_written_too():
    html = merged(Net(), Net(seed=1), matcher=Average(), verify=False).report.html()
    assert "not checked" in html
    assert ">Repair</h2>" not in html


def hostile() -> fxmerge.MergeResult:
    kind = type(HOSTILE, (Net,), {})
    return merged(kind(hidden="<b onclick=alert(1)>"), kind(seed=1, hidden="<b onclick=alert(1)>"), data=[X])


def test_names_cannot_inject():
    result = hostile()
    for html in (result.report.html(), result._repr_html_(), result.report.classes._repr_html_()):
        assert "<img" not in html
        assert "<b onclick" not in html
        assert html.count("</script>") == (2 if html.startswith("<!doctype") else 0)
    data = data_of(result.report.html())
    assert data["networks"] == [HOSTILE] * 2
    assert any(n["target"] == "<b onclick=alert(1)>.0.up" for n in data["nodes"])


def test_notebooks_show_tables(pair):
    html = pair._repr_html_()
    assert html == pair.report._repr_html_()
    assert "<script" not in html
    assert "blocks.1.up.weight:0" in html
    assert "from network 2 alone" in html
    shown = pair.report.classes._repr_html_()
    assert shown.count("<tr>") == 1 + len(pair.report.classes)
    assert str(pair.report.classes).splitlines()[-1] in shown


# In a browser -----------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[Any]:
    """Opens a page; in the end, it must have said nothing on the console and asked the network for nothing."""
    heard: list[str] = []
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    tab = context.new_page()
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: heard.append(request.url) if not request.url.startswith("file:") else None)

    def open_page(html: str) -> Any:
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        tab.goto((tmp_path / "page.html").as_uri())
        return tab

    yield open_page
    context.close()
    assert heard == []


def row(tab: Any, name: str) -> Any:
    return tab.locator(f'.row[aria-label^="{name}"]').first


def test_a_click_on_a_node_shows_its_class(pair, barrier, opened):
    tab = opened(pair.report.html(barrier))
    if not row(tab, "blocks.1.up").is_visible():
        row(tab, "blocks.1").click()
    row(tab, "blocks.1.up").click()
    panel = tab.locator("#panel")
    assert panel.locator("h3").inner_text() == "blocks.1.up"
    card = panel.locator(".card")
    assert "blocks.1.up.weight:0" in card.inner_text()
    assert "Linear(in_features=8, out_features=16" in panel.inner_text()
    card.get_by_role("button").click()
    assert tab.locator(".row.same").count() >= 2
    assert row(tab, "blocks.1.up").get_attribute("class") == "row same"
    panel.locator(".link").first.click()  # where its values come from
    assert panel.locator("h3").inner_text() == "add"


def test_groups_open_and_close(pair, opened):
    tab = opened(pair.report.html())
    tab.locator("#close").click()
    assert tab.locator(".row").count() == len(data_of(pair.report.html())["tree"])
    row(tab, "blocks").click()
    assert row(tab, "blocks").get_attribute("aria-expanded") == "true"
    row(tab, "blocks.2").click()
    assert row(tab, "blocks.2.down").is_visible()
    assert tab.locator(".lines path").count() >= tab.locator(".row").count() - 3
    row(tab, "blocks").click()
    assert not row(tab, "blocks.2").is_visible()
    tab.locator("#open").click()
    assert tab.locator(".row:not(.group)").count() == len(data_of(pair.report.html())["nodes"])


def test_keys_move_through_the_picture(pair, opened):
    tab = opened(pair.report.html())
    tab.locator("#close").click()
    row(tab, "blocks").click()
    tab.keyboard.press("ArrowLeft")  # closes it
    assert tab.locator(".row:focus").get_attribute("aria-expanded") == "false"
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".row:focus").get_attribute("aria-label").startswith("blocks.0")
    tab.keyboard.press("Home")
    assert tab.locator("#panel h3").inner_text() == "x"
    assert tab.locator('.row[tabindex="0"]').count() == 1


def test_search_finds_what_is_folded(pair, opened):
    tab = opened(pair.report.html())
    tab.locator("#close").click()
    tab.locator("#find").fill("blocks.2.DOWN")
    assert tab.locator("#found .hit").all_inner_texts()[0].startswith("blocks.2.down")
    tab.keyboard.press("Enter")
    assert row(tab, "blocks.2.down").is_visible()
    assert tab.locator("#panel h3").inner_text() == "blocks.2.down"
    tab.locator("#find").fill("no such layer")
    assert tab.locator("#found").inner_text() == "nothing found"


def test_names_do_nothing_in_a_browser(opened):
    tab = opened(hostile().report.html())
    tab.locator("#open").click()
    for line in tab.locator(".row:not(.group)").all():
        line.click()
    assert tab.locator("img, b").count() == 0
    assert HOSTILE in tab.locator("h1").inner_text()


def test_a_phone_shows_all_without_sideways_scrolling(pair, barrier, opened):
    tab = opened(pair.report.html(barrier))
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert row(tab, "stem").is_visible()


def test_a_network_of_three_hundred_operations_stays_usable(opened):
    def deep(seed: int) -> nn.Module:
        parts = [nn.Sequential(nn.Linear(4, 4), *(nn.ReLU() for _ in range(24))) for _ in range(12)]
        return randomise(nn.Sequential(*parts), seed)

    options = {"example_inputs": torch.randn(2, 4), "matcher": WeightMatching(restarts=1), "verify": False}
    html = merged(deep(0), deep(1), **options).report.html()
    tab = opened(html)
    assert tab.locator(".row").count() < 60
    tab.locator("#open").click()
    assert tab.locator(".row").count() == 12 + 302
    tab.locator("#find").fill("9.12")
    tab.keyboard.press("Enter")
    assert tab.locator(".row:focus").get_attribute("aria-label").startswith("9.12")
    assert row(tab, "9.12").evaluate("r => { const y = r.getBoundingClientRect().y; return y > 0 && y < innerHeight }")
