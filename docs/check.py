"""Check the built documentation: the reference is whole, no link is broken, browsers show it.

``make docs`` runs the first two, ``make check-docs`` also opens pages in a real browser, wide and
narrow, where ``chromium`` is installed. Pictures of the pages go to ``docs/_build/pictures``.
"""

import functools
import http.server
import re
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from sphinx.util.inventory import InventoryFile

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import reference

HTML = Path(__file__).parent / "_build" / "html"
PICTURES = HTML.parent / "pictures"
PAGES = ["index.html", "guide/influence.html", "api/skperf.InfluenceScorer.html"]
PAGES += ["notebooks/4_components.html", "guide/peers.html"]
ESTIMATORS = ["PerformativeAdapter", "Reprogrammer", "InfluenceScorer", "ComponentAttributor"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=15000"]


class Page(HTMLParser):
    """The links, anchors, remote assets and described parameters of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.remote = [], set(), []
        self.entries, self._object, self._in_entry = {}, None, False
        self.feed(text)

    def handle_data(self, data):
        # the bold names in front of the descriptions of parameters
        if self._in_entry:
            names = {name.strip("* ") for name in data.split(",")}
            self.entries.setdefault(self._object, set()).update(names)

    def handle_endtag(self, tag):
        self._in_entry = self._in_entry and tag != "strong"

    def handle_starttag(self, tag, attrs):
        self._in_entry = self._in_entry or tag == "strong"
        values = dict(attrs)
        if tag == "dt" and (values.get("id") or "").startswith("skperf."):
            self._object = values["id"]
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        source = values.get("src") if tag in ("script", "img") else None
        if tag == "link" and "stylesheet" in (values.get("rel") or ""):
            source = values.get("href")
        if source and re.match(r"(https?:)?//", source):
            self.remote.append(source)


def broken_links():
    pages = {p.relative_to(HTML).as_posix(): Page(p.read_text()) for p in HTML.rglob("*.html")}
    for name, page in pages.items():
        yield from (f"{name}: remote asset {source}" for source in page.remote)
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, anchor = urldefrag(urljoin(name, link))
            target = unquote(target) or name
            if not (HTML / target).exists():
                yield f"{name}: no page {link}"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{name}: no anchor {link}"


def missing_from_the_reference():
    """Names of `api.md`, their methods and parameters that the inventory or their page lacks."""
    with (HTML / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, page: page)
    objects = {name for role in inventory if role.startswith("py:") for name in inventory[role]}
    for name in reference.listed_names():
        for shown in [name, *(f"{name}.{m}" for m in reference.page_methods(name))]:
            if shown not in objects:
                yield f"{shown} is not in the inventory"
        page = HTML / "api" / f"{name}.html"
        entries = Page(page.read_text()).entries if page.exists() else {}
        for owner in [name, *(f"{name}.{m}" for m in reference.own_methods(name))]:
            for parameter in reference.parameters(owner):
                waits = owner.startswith(reference.UNFINISHED)
                if parameter not in entries.get(owner, ()) and not waits:
                    yield f"{owner}: no entry for the parameter {parameter} on its page"


def browse(url, *flags):
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}", *flags, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console_errors(done):
    return re.findall(r"CONSOLE.*?\] (.*(?:[Ee]rror|Failed|Uncaught).*)", done.stderr)


def seen_in_a_browser():
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(HTML))
    http.server.SimpleHTTPRequestHandler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    PICTURES.mkdir(exist_ok=True)
    for page in PAGES:
        for width in (1280, 500):
            picture = PICTURES / f"{Path(page).stem}-{width}.png"
            done = browse(root + page, f"--window-size={width},1600", f"--screenshot={picture}")
            yield from (f"{page} at {width}: {error}" for error in console_errors(done))
    if "mjx-container" not in browse(root + "guide/influence.html", "--dump-dom").stdout:
        yield "guide/influence.html: no formula was rendered"
    for name in ESTIMATORS:
        found = browse(f"{root}search.html?q={name}", "--dump-dom").stdout
        if f"api/skperf.{name}.html" not in found:
            yield f"search does not find {name}"


def main():
    problems = [*broken_links(), *missing_from_the_reference()]
    if "--browser" in sys.argv:
        problems += seen_in_a_browser()
    print("\n".join(problems) or f"{len(list(HTML.rglob('*.html')))} pages, nothing broken")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
