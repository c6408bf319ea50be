"""The documentation site in headless Chromium: search, links, tables, and what the console says."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
BUILT = os.environ.get("SRIGL_SITE")  # a site that is built already, as in CI

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
if not BUILT:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
if not CHROMIUM:
    pytest.skip("Chromium is not installed", allow_module_level=True)

WIDTHS = (1300, 390)
LINKS = "[...document.links].map(link => link.href)"
TARGETS = "[...document.querySelectorAll('[id]')].map(element => element.id)"
CUT_OFF = """() => {
  const scrolls = element => element !== document.body && element !== null && (
    ['auto', 'scroll'].includes(getComputedStyle(element).overflowX)
    || scrolls(element.parentElement));
  const wide = [...document.querySelectorAll('article table, article pre, article img')].filter(
    part => part.getBoundingClientRect().right > innerWidth && !scrolls(part));
  const names = wide.map(part => part.outerHTML.slice(0, 100));
  return document.documentElement.scrollWidth > innerWidth ? [...names, 'the page'] : names;
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Yield the folder of the site and the address that serves it."""
    folder = Path(BUILT) if BUILT else tmp_path_factory.mktemp("site")
    if not BUILT:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(site):
    """Yield a page of the browser, and the list of what went wrong in it."""
    _, address = site
    wrong = []

    def only_here(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            wrong.append(f"asks for {route.request.url}")
            route.abort()

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
        page.route("**/*", only_here)
        page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
        page.on(
            "console",
            lambda message: message.type == "error" and wrong.append(f"{page.url}: {message.text}"),
        )
        yield page, wrong
        browser.close()


def settled(page):
    """Return what is cut off when the page has laid itself out."""
    with contextlib.suppress(playwright.TimeoutError):
        page.wait_for_function(f"({CUT_OFF})().length === 0", timeout=3000)
    return page.evaluate(CUT_OFF)


@pytest.mark.timeout(600)
def test_every_page_is_whole(site, tab):
    folder, address = site
    page, wrong = tab
    cut_off, links, targets = [], {}, {}
    for file in sorted(folder.rglob("*.html")):
        url = f"{address}/{file.relative_to(folder).as_posix()}"
        page.goto(url, wait_until="load")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            cut_off += [f"{url} at {width}: {part}" for part in settled(page)]
        links[url], targets[url] = page.evaluate(LINKS), set(page.evaluate(TARGETS))
    assert not cut_off
    assert not wrong

    broken = []
    for source, found in links.items():
        for link in found:
            url, fragment = urldefrag(link)
            if not url.startswith(address):
                continue
            file = folder / unquote(url.removeprefix(address)).lstrip("/")
            file, url = (file / "index.html", f"{url}index.html") if file.is_dir() else (file, url)
            known = not fragment or url not in targets or unquote(fragment) in targets[url]
            if not file.exists() or not known:
                broken.append(f"{source}: {link}")
    assert not broken


def test_search_finds_a_word_of_the_glossary(site, tab):
    _, address = site
    page, wrong = tab
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})
    page.goto(f"{address}/index.html", wait_until="load")
    page.get_by_role("textbox", name="Search").press_sequentially("ablation")
    results = page.locator(".md-search-result__link")
    results.first.wait_for(timeout=30_000)
    found = " ".join(results.nth(i).get_attribute("href") for i in range(results.count()))
    assert "names.html" in found
    assert "semantics.html" in found
    assert not wrong
