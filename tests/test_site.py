"""The documentation: every link leads somewhere, on GitHub and on the site, which a browser opens
from the disk.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.report import browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "dpfast").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
FENCE = re.compile(r"^(`{3,}).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:\\.|[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def prose(page):
    """The text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        words = LINK.sub(r"\2", heading).replace("`", "").strip().lower()
        found[re.sub(r"[^\w\- ]", "", words).replace(" ", "-")] += 1
    return {name + (f"-{i}" if i else "") for name, times in found.items() for i in range(times)}


def links(page):
    """(is a picture, text, target) of each link of a page to a file."""
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)(?!\])", "", prose(page))
    return [(bool(mark), words, to) for mark, words, to in LINK.findall(text) if ":" not in to]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_an_anchor(page):
    wrong = []
    for picture, words, target in links(page):
        path, _, anchor = target.partition("#")
        to = (page.parent / unquote(path)).resolve() if path else page
        there = to.is_file() and to.is_relative_to(ROOT)
        if not there or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            wrong.append(target)
        elif picture and len(words) < 5:
            wrong.append(f"{target} says nothing to those who cannot see it")
    assert wrong == []


def test_the_pages_have_links():
    assert sum(len(links(page)) for page in PAGES) > 100


class Html(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, file):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.loads += [given["src"]] if given.get("src") else []
        if tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("no mkdocs; pip install -c constraints.txt '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    assert built.returncode == 0, built.stderr  # strict: a warning is an error
    return folder


def test_the_site_has_every_page_and_its_links_lead_somewhere(site):
    pages = {file: Html(file) for file in site.rglob("*.html") if file.name != "404.html"}
    for page in DOCS.rglob("*.md"):
        assert site / page.relative_to(DOCS).with_suffix(".html") in pages
    for file, page in pages.items():
        for target in page.loads:
            assert (file.parent / target).is_file(), (file, target)  # and nothing of other hosts
        for target in page.links:
            path, _, anchor = target.partition("#")
            if ":" in path:
                assert path.startswith("https://"), (file, target)
                continue
            to = (file.parent / unquote(path)).resolve() if path else file
            assert to.is_file(), (file, target)
            assert not anchor or anchor in pages[to].anchors, (file, target)


@pytest.fixture
def tab():
    """A browser of its own: it remembers whether pages are dark."""
    binary = browser.find()
    if binary is None:
        pytest.skip("no headless Chromium; apt-get install chromium-headless-shell")
    with browser.Page(binary) as page:
        yield page


OPENED = ("index", "quickstart", "concepts", "results", "guides/many_gpus", "reference/api")


@pytest.mark.long
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)], ids=["phone", "desktop"])
def test_pages_open_from_the_disk_whole_and_in_silence(site, tab, width, dark):
    source = min((site / "source").rglob("*.py.html"))
    for name in (*(site / f"{page}.html" for page in OPENED), source):
        tab.open(name, width=width, dark=dark)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
        assert tab.evaluate(broken) == 0, name
        scheme = tab.evaluate("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default"), name
        kinds = {event["method"] for event in tab.events}
        assert not kinds & {
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
        }, name
        urls = [
            event["params"]["request"]["url"]
            for event in tab.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert {url.partition(":")[0] for url in urls} <= {"file", "data"}, name


@pytest.mark.long
def test_the_search_finds_pages_without_a_server(site, tab):
    tab.open(site / "guides" / "extend.html", width=1280)
    typed = """new Promise(done => {
        const field = document.querySelector(".md-search__input");
        const found = document.querySelector(".md-search-result__list");
        new MutationObserver(() => done(found.children.length)).observe(found, {childList: true});
        field.focus();
        field.value = "patience";
        field.dispatchEvent(new Event("keyup", {bubbles: true}));
        setTimeout(() => done(0), 20000);
    })"""
    assert tab.evaluate(typed) > 0


def test_the_drawing_of_the_concepts_has_its_texts_within_or_beside_its_boxes(tab):
    tab.open(DOCS / "images" / "concepts.svg", width=500)
    crossing = """(() => {
        const [card, ...boxes] = [...document.querySelectorAll("rect")].map(r => r.getBBox());
        const holds = (a, b) => a.x <= b.x && a.y <= b.y
            && a.x + a.width >= b.x + b.width && a.y + a.height >= b.y + b.height;
        const apart = (a, b) => a.x > b.x + b.width || b.x > a.x + a.width
            || a.y > b.y + b.height || b.y > a.y + a.height;
        return [...document.querySelectorAll("text")].filter(text => {
            const at = text.getBBox();
            return !holds(card, at) || !boxes.every(box => holds(box, at) || apart(box, at));
        }).map(text => text.textContent);
    })()"""
    assert tab.evaluate("document.querySelectorAll('text').length") > 15
    assert tab.evaluate(crossing) == []
