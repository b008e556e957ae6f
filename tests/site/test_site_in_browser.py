"""The built site in Chromium: no errors, nothing from elsewhere, search, a phone, the dark."""

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from accessibility import assert_accessible

pytestmark = pytest.mark.browser

SITE = Path(__file__).resolve().parents[2] / "site/_build/html"
NAMES = [
    str(path.relative_to(SITE))
    for path in sorted(SITE.rglob("*.html"))
    if path.parent.name not in ("_static", "playground")
]
if not NAMES:
    pytest.skip("the site is not built: make site", allow_module_level=True)
PHONE = {"width": 390, "height": 844}
SMALLEST = 320  # and a desktop page at 400 %: https://www.w3.org/TR/WCAG22/#reflow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served: on this machine, as GitHub Pages would."""
    handler = partial(SimpleHTTPRequestHandler, directory=SITE)

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def complaints(page, address) -> list[str]:
    """What the console says, and what is asked of other machines, while a page is used."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))

    def on_console(said) -> None:
        if said.type in ("error", "warning"):
            found.append(said.text)

    def on_request(asked) -> None:
        if not asked.url.startswith((address, "file:", "data:", "blob:")):
            found.append(asked.url)

    page.on("console", on_console)
    page.on("request", on_request)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_page_opens_without_a_complaint_and_fits_a_phone(page, complaints, name):
    """From disk and without a network; a phone scrolls it up and down only, a small one too."""
    page.goto((SITE / name).as_uri())
    assert page.locator("h1:visible").count() == 1 and complaints == []
    for width in (PHONE["width"], SMALLEST):
        page.set_viewport_size(PHONE | {"width": width})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(page, name, width, scheme):
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.goto((SITE / name).as_uri())
    assert_accessible(page)


def test_formulas_are_drawn(page, complaints, address):
    """By the MathJax beside the page; the text of the formula is not left standing."""
    page.goto(address + "bias_editing.html")
    page.locator("mjx-container svg").first.wait_for()
    assert "\\(" not in page.locator("article").inner_text() and complaints == []


def test_the_search_finds_bias_editing(page, complaints, address):
    """As a reader asks for it: a shortcut, two words, and the notebook is among the first."""
    page.goto(address + "index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("bias editing")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    addresses = [link.get_attribute("href") for link in found.all()[:3]]
    assert any("bias_editing.html" in address for address in addresses), addresses
    found.first.click()
    page.wait_for_url(lambda address: "search.html" not in address)
    assert page.locator("article h1").is_visible()
    assert complaints == []


def test_the_search_works_from_disk(page):
    """Without the lines around what was found: a browser reads no other file there."""
    page.goto((SITE / "search.html").as_uri() + "?q=steering")
    page.locator("#search-results li a").first.wait_for()


def test_the_search_finds_a_function_of_the_library(page, address):
    page.goto(address + "search.html?q=train_steering_vector")
    found = page.locator("#search-results li a", has_text="train_steering_vector")
    found.first.wait_for()
    assert any("reference/vectors.html" in link.get_attribute("href") for link in found.all())


def test_light_and_dark(page, complaints, address):
    """The reader's system decides, and the button changes it."""
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(address + "index.html")
        assert page.locator("html").get_attribute("data-theme") == scheme
        colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]
    page.get_by_role("button", name="Color mode").click()
    page.locator(".dropdown-menu.show").get_by_text("Light").click()
    assert page.locator("html").get_attribute("data-theme") == "light" and complaints == []


def test_the_front_page_leads_on_by_keyboard(page, complaints, address):
    """The path for a researcher, from link to notebook."""
    page.goto(address + "index.html")
    row = page.locator("tr", has_text="a researcher")
    row.get_by_role("link", name="training_vectors").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/guides/training_vectors.html")
    assert page.locator("article h1").inner_text().startswith("Vectors from many pairs")
    assert complaints == []


@pytest.mark.parametrize("where", ["served", "from disk"])
def test_the_playground_steers_when_it_is_asked_for(page, complaints, address, where):
    """Not before: it is as large as all other pages together."""
    page.goto((address if where == "served" else f"{SITE.as_uri()}/") + "index.html")
    assert page.locator("iframe").count() == 0
    page.get_by_role("button", name="Load the model").click()
    frame = page.frame_locator(".playground iframe")
    frame.locator("body[data-state=counted]").wait_for(timeout=120_000)
    assert "wonderful" in frame.locator(".card.steered .text").inner_text()
    assert "wonderful" not in frame.locator(".card.unsteered .text").inner_text()
    assert complaints == []
