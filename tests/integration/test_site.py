"""The site: links and images are there, nothing comes from elsewhere, it fits a telephone."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from ssah.core.paths import project_root

pytest.importorskip("material", reason="the site needs pip install '.[docs]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install '.[docs]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

#: Least contrast of text with its ground, of WCAG's level AA.
CONTRAST = 4.5

#: Colour scheme and width, in px.
LOOKS = (("light", 1280), ("light", 375), ("dark", 375), ("dark", 1280))

#: Everything that a page names, and how it looks, as the browser sees it.
FACTS = """() => ({
    links: [...document.querySelectorAll('a[href], link[href], script[src], img[src]')]
        .map(e => e.href || e.src),
    ids: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
    images: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
})"""
TOO_WIDE = """() => new Promise(found => requestAnimationFrame(() => requestAnimationFrame(
    () => found(document.documentElement.scrollWidth - document.documentElement.clientWidth)
)))"""
COLOURS = """() => {
    const shown = (e) => e && e.checkVisibility() && e.innerText.trim();
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
        }
        return getComputedStyle(document.documentElement).colorScheme.includes('dark')
            && matchMedia('(prefers-color-scheme: dark)').matches
            ? 'rgb(18, 18, 18)' : 'rgb(255, 255, 255)';
    };
    return ['p', 'td', 'th', 'li', 'h1', 'h2', 'code', 'a:not(.headerlink)'].map(
        name => [...document.querySelectorAll(`article ${name}, body > ${name}`)].find(shown)
    ).filter(e => e).map(e => [e.tagName, getComputedStyle(e).color, behind(e)]);
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    for command in (
        [sys.executable, "docs/pages.py"],
        [
            *(sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"),
            *("--config-file", "build/site/mkdocs.yml", "--site-dir", str(folder)),
        ],
    ):
        done = subprocess.run(
            command, cwd=project_root(), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Of the site on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def pages_of(site: Path) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


def test_every_page_is_built(site):
    pages = pages_of(site)
    for name in ("index", "established", "results", "faq", "reference/units", "published/index"):
        assert f"{name}.html" in pages
    claims = {Path(page).stem for page in pages if page.startswith("claims/")}
    assert claims == {p.stem for p in (project_root() / "notebooks").glob("0[1-9]*.ipynb")}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_pages_in_a_browser(site, address):
    """In light and dark, on a wide and on a narrow screen."""
    problems, named, ids = [], {}, {}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(reduced_motion="reduce")
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda r: r.url.startswith((address, "data:", "blob:")) or problems.append(r.url),
        )
        for name in pages_of(site):
            page.emulate_media(color_scheme="light")
            page.goto(address + name, wait_until="load")
            page.add_style_tag(content="* { transition: none !important }")
            facts = page.evaluate(FACTS)
            named[name], ids[name] = facts["links"], set(facts["ids"])
            problems += [f"{name}: broken image {image}" for image in facts["images"]]
            for scheme, width in LOOKS:
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size({"width": width, "height": 900})
                look = f"{name}, {scheme}, {width} px"
                if (excess := page.evaluate(TOO_WIDE)) > 0:
                    problems.append(f"{look}: {excess} px too wide")
                problems += [f"{look}: {problem}" for problem in faint(page.evaluate(COLOURS))]
        browser.close()
    assert not problems + broken(site, address, named, ids)


def broken(
    site: Path, address: str, named: dict[str, list[str]], ids: dict[str, set[str]]
) -> list[str]:
    """Links of the site's pages to files or places of it that are not there."""
    found = []
    for name, links in named.items():
        for link in {urljoin(address + name, link) for link in links}:
            whole, place = urldefrag(link)
            if not whole.startswith(address):
                continue
            target = unquote(whole.removeprefix(address)) or "index.html"
            missing = not (site / target).is_file()
            if missing or (place and target in ids and unquote(place) not in ids[target]):
                found.append(f"{name}: broken link {link}")
    return found


def faint(colours: list[list[str]]) -> list[str]:
    """Texts that hardly differ from their ground."""
    return [
        f"{tag}: {text} on {ground}"
        for tag, text, ground in colours
        if contrast(text, ground) < CONTRAST
    ]


def contrast(text: str, ground: str) -> float:
    """Of WCAG 2.2: 1 for equal colours, 21 for black on white."""
    *colour, opacity = rgba(text)
    below = rgba(ground)[:3]
    seen = [opacity * a + (1 - opacity) * b for a, b in zip(colour, below, strict=True)]
    lighter, darker = sorted((luminance(seen), luminance(below)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def rgba(colour: str) -> list[float]:
    numbers = [float(n) for n in colour[colour.index("(") + 1 : -1].replace("/", ",").split(",")]
    return [*(n / 255 for n in numbers[:3]), *(numbers[3:] or [1.0])]


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)
    assert contrast("rgba(0, 0, 0, 0)", "rgb(9, 9, 9)") == pytest.approx(1)
