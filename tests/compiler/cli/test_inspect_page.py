"""The page of a program: it stands alone, every link in it leads somewhere, and a browser walks through it by keyboard."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from moec.compiler.cli.page_weights import expert_tables, sensitivity_table
from moec.targets.serving.routing import routing_text
from moec_command import invoke
from places import ROOT

pytest.importorskip("matplotlib")
LAYERS, EXPERTS = 4, 16  # of the example
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Collects the elements of a page, and checks that they are closed in their order."""

    EMPTY = ("meta", "input", "br", "use", "path", "rect", "image")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return the page of the example, with a recorded routing."""
    folder = tmp_path_factory.mktemp("page")
    counts = [[1 + (e == layer) for e in range(EXPERTS)] for layer in range(LAYERS)]
    (folder / "routing.json").write_text(routing_text("tiny", 9, counts))
    arguments = ("examples/tiny-moe", "--target", "nvidia-h100", "--routing", folder / "routing.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        result = invoke("inspect", *map(str, arguments), "--html", str(folder / "page.html"))
    assert result.exit_code == 0, result.stderr
    return folder / "page.html"


def test_it_stands_alone_and_its_links_lead_somewhere(file):
    text = file.read_text("utf-8")
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids) and len(inside) > 40
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"\b(?:src|href)\s*=\s*[\"']?(?:https?:|//)|@import|fetch\(|XMLHttp", text)


def test_it_shows_the_program(file):
    text = file.read_text("utf-8")
    report = json.loads(invoke("inspect", str(ROOT / "examples/tiny-moe"), "--json").stdout)
    for kind in report["kinds"]:
        section = re.search(rf'<section id="fn-{kind["function"]}">.*?</section>', text, re.S)[0]
        assert section.count("<rect ") == kind["ops"]
        assert len(re.findall(rf'id="op-{kind["function"]}-', text)) == kind["ops"]
    card = re.search(r'<article class="card" id="op-layer-experts".*?</article>', text, re.S)[0]
    assert "moe.experts" in card and 'href="#op-layer-div"' in card and "mlp.experts" in card
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == 6 and any("recorded routing" in c for c in captions) and any("roofs" in c for c in captions)
    summaries = re.findall(r"<summary>\d+\. ([\w-]+): \d+ statements after it", text)
    assert {"lift-moe", "fuse-attention"} <= set(summaries)
    assert re.search(r'<span class="plus">\+  %\S+, %\S+ = moe\.route\(', text) and '<span class="minus">-' in text


def test_a_dump_is_shown_and_a_page_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.moir").write_text(
        "moec 1 stage moe\ndim B in 1..4\n\nfunc @main(%x: f32[B, 4]) -> (f32[B, 4]) {\n"
        '  const %w : f32[4, 4] = tensor("w", f32[4, 4])\n  %y = core.linear(%x, %w, _) : f32[B, 4]\n  return %y\n}\n'
    )
    assert invoke("inspect", "one.moir", "--html", "one.html").exit_code == 0
    text = Path("one.html").read_text("utf-8")
    assert "The program is at stage moe" in text and 'id="weight-main-w"' in text
    monkeypatch.setattr("moec.compiler.cli.inspect_page.LARGEST", 1000)
    large = invoke("inspect", "one.moir", "--html", "large.html")
    assert large.exit_code == 2 and "would be larger than 1 kB" in large.stderr and not Path("large.html").exists()
    bad = invoke("inspect", "one.moir", "--html", "one.html", "--quantize", "int4")
    assert bad.exit_code == 2 and "--html is of a program as it is" in bad.stderr


def test_what_a_plan_of_formats_knows(tmp_path):
    weights = [
        {"layers": "0..1", "role": "attention", "experts": None, "format": "int8_g128", "bytes": 8, "kl": 0.5},
        {"layers": "0", "role": "experts", "experts": "0..2", "format": "uint4_g64", "bytes": 8, "kl": 0.25},
        {"layers": "0", "role": "experts", "experts": "3", "format": "f32", "bytes": 8, "kl": 0.0},
        {"layers": None, "role": "head", "experts": None, "format": "int8_g128", "bytes": 8, "kl": None},
    ]
    plan = {"quantization": 1, "budget": "4bpw", "method": "rtn", "bits_per_weight": 4.0, "bytes": 32, "kl": 1.0}
    (tmp_path / "quantization.json").write_text(json.dumps({**plan, "tokens": 9, "weights": weights}))
    table = sensitivity_table(tmp_path)
    assert table["rows"] == ["attention", "experts"] and table["cells"] == [[None, 0.25, 0.25], [None, 0.25, None]]
    seen = {"figures": {"calibration": {"layers": [{"layer": "a", "tokens": [5, 6]}]}}}
    (_, formats, _), (_, load, caption) = expert_tables(tmp_path, seen, ())
    assert [round(bits, 2) for bits in formats["cells"][0]] == [
        4.56,
        4.56,
        4.56,
        32.0,
    ]  # 16 bits of a scale and 20 of a zero point in groups of 64
    assert load["cells"] == [[5, 6]] and "calibration text" in caption
    assert sensitivity_table(tmp_path / "none") is None


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_walks_through_it(file):
    """By keyboard alone: a layer, an op, a weight, the search; both themes, no error and no request but for the page."""
    playwright = pytest.importorskip("playwright.sync_api")
    problems, requests = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=120_000
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        page.get_by_role("link", name="@layer", exact=True).first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#fn-layer"
        page.locator("#fn-layer .graph a").first.focus()
        place = "document.activeElement.getAttribute('href')"
        first = page.evaluate(place)
        page.keyboard.press("ArrowDown")
        below = page.evaluate(place)
        assert below != first and below.startswith("#op-layer-")
        page.keyboard.press("ArrowUp")
        assert page.evaluate(place) == first
        page.keyboard.press("Enter")
        card = page.locator(f'[id="{first[1:]}"]')
        assert card.is_visible() and page.evaluate("document.activeElement.id") == first[1:]
        page.keyboard.press("Escape")
        assert not card.is_visible() and page.evaluate(place) == first
        page.evaluate("location.hash = 'op-layer-experts'")
        page.locator("#op-layer-experts a[href^='#weight-']").first.focus()
        page.keyboard.press("Enter")
        weight = page.locator(".card:target")
        assert weight.inner_text().startswith("close") and "tensor(" in weight.inner_text()
        page.screenshot(path=file.with_name("light.png"))
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        page.keyboard.type("qkv")
        assert 0 < page.locator("tr[data-find]:visible").count() < page.locator("tr[data-find]").count()
        page.locator("#theme").click()
        assert page.evaluate(background) != light
        page.screenshot(path=file.with_name("dark.png"))
        page.emulate_media(color_scheme="dark")
        page.reload()
        assert page.evaluate(background) != light  # what the system asks for
        browser.close()
    assert not problems and {url.partition("#")[0] for url in requests} == {file.as_uri()}
    assert file.with_name("light.png").stat().st_size > 10_000 and file.with_name("dark.png").stat().st_size > 10_000
