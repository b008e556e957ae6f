"""The playground in Chromium, from disk: what it writes, and whether everybody can use it."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from accessibility import assert_accessible
from page_reference import HALF_A_LETTER, Case

from common import SteeringVector, completions, generate, tone_sign, train_steering_vector
from common.loading import known_preset
from repository.playground import FIRST_PROMPT, project

playwright = pytest.importorskip("playwright.sync_api", reason="`make browser` runs this")
expect, Page = playwright.expect, playwright.Page

pytestmark = pytest.mark.browser
PATIENCE = 60_000  # ms, on a busy machine
CARDS = [".card.unsteered .text", ".card.steered .text", ".card.random .text"]
# Follow a link, wait until its texts are written, and return them, or what is said instead.
FOLLOW = """hash => new Promise(resolve => {
  let begun = false;
  const { dataset } = document.body;
  const observer = new MutationObserver(() => {
    begun ||= dataset.state === "writing";
    if (!begun || !["written", "refused"].includes(dataset.state)) return;
    observer.disconnect();
    const texts = [...document.querySelectorAll(".card .text")].map(it => it.textContent);
    const error = document.querySelector("#prompt-error").textContent;
    resolve({ texts, error });
  });
  observer.observe(document.body, { attributeFilter: ["data-state"] });
  location.hash = hash;
})"""


def link(case: Case) -> str:
    return urlencode({**case._asdict(), "sampled": int(case.sampled)})


@contextlib.contextmanager
def opened(browser: Any, path: Path, hash: str = "", **options: Any) -> Iterator[Any]:
    """The page in a context of its own; at the end it must have met no fault."""
    context = browser.new_context(**options)
    faults: list[str] = []
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.goto(f"{path.as_uri()}#{hash}")
    yield page
    context.close()
    assert faults == []


def wait(page: Any, state: str) -> None:
    page.locator(f"body[data-state={state}]").wait_for(timeout=PATIENCE)


@pytest.fixture(scope="module")
def texts(browser, built, cases) -> list[dict[str, Any] | None]:
    """What the page shows for each case, by links followed one after the other."""
    with opened(browser, built) as page:
        wait(page, "written")
        return [
            None if case.prompt == HALF_A_LETTER else page.evaluate(FOLLOW, link(case))
            for case in cases
        ]


@pytest.fixture
def desk(browser, built) -> Iterator[Any]:
    """The page on a desktop, with its first texts written."""
    with opened(browser, built, viewport={"width": 1280, "height": 900}) as page:
        wait(page, "written")
        yield page


def test_the_page_writes_torchs_texts(cases, answers, texts):
    """Each of 200 cases by its link; a prompt that is refused shows why instead."""
    for case, answer, it in zip(cases, answers, texts, strict=True):
        if it is None:
            continue
        if answer is None:
            assert it["error"].startswith("The prompt ") and it["texts"] == ["–"] * 3
        else:
            # A textarea, and so a prompt as it is shown, knows one kind of line end.
            assert it["error"] == ""
            assert it["texts"] == [case.prompt + text for text in answer.texts], case


def test_nothing_is_loaded_or_sent(browser, built):
    """Not even after every button; the browser would refuse it besides."""
    asked: list[str] = []
    with opened(browser, built) as page:
        page.on("request", lambda request: asked.append(request.url))
        wait(page, "counted")
        for name in ("fill", "more", "copy", "link", "swap", "preset", "reset"):
            page.locator(f"#{name}").click()
        wait(page, "counted")
        policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert [url for url in asked if not url.startswith(("blob:", "data:"))] == []
    assert "default-src 'none'" in policy


def test_first_text_in_under_a_second(browser, built):
    """From opening the file to the first word; the best of three."""
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        pytest.skip("others compute on this machine, so no time means anything")
    took = []
    for _ in range(3):
        with opened(browser, built) as page:
            took.append(
                page.evaluate("""() => new Promise(resolve => {
                  const look = () => document.querySelector(".card.steered .text .given")
                    ? resolve(performance.now()) : requestAnimationFrame(look);
                  look();
                })""")
            )
    assert min(took) < 1000


def test_typing_shows_tokens_untaught_words_and_another_text(desk):
    desk.get_by_label("Prompt", exact=True).fill("I think the plumber is")
    expect(desk.locator("#prompt-notes")).to_have_text("The grammar never taught: plumber.")
    shown = desk.locator("#tokens span").all_text_contents()
    assert "".join(shown) == "I·think·the·plumber·is" and len(shown) > 5
    expect(desk.locator(CARDS[1])).to_contain_text("I think the plumber is")
    desk.get_by_label("Away from", exact=True).fill("Love")
    expect(desk.locator("#pair-error")).to_have_text(
        "After block 3, “Love” and “Love” do not differ at their last token, so there is no"
        " direction from one to the other."
    )
    assert desk.get_by_label("Away from", exact=True).get_attribute("aria-invalid") == "true"
    desk.get_by_label("Away from", exact=True).fill("Hate")
    wait(desk, "written")
    expect(desk.locator("#pair-error")).to_be_empty()


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("Coefficient, as a number", "5000", "from −1000 to 1000 as the coefficient, got “5000”"),
        ("New tokens", "1.5", "a whole number from 1 to 255 as the number of new tokens"),
        ("Text seed", "-1", "as the seed of the texts, got “−1”"),
        ("Random seed", "", "a whole number from 0 to 4294967295"),
    ],
)
def test_a_wrong_number_is_refused_in_words(desk, field, text, words):
    """And the texts stay as they are."""
    before = [desk.locator(card).text_content() for card in CARDS]
    desk.get_by_label(field, exact=True).fill(text)
    desk.keyboard.press("Tab")
    assert desk.get_by_label(field, exact=True).get_attribute("aria-invalid") == "true"
    alert = desk.locator("[role=alert]").filter(has_text=words)
    expect(alert).to_be_visible()
    assert [desk.locator(card).text_content() for card in CARDS] == before


@pytest.mark.parametrize("button", ["#preset", "#reset", '#map [data-coeff="7.8"] >> nth=0'])
def test_what_was_wrong_goes_with_it(desk, button):
    """Of two wrong numbers each is told; and none any more once others stand in the fields."""
    desk.locator("#length").fill("900")
    desk.locator("#seed").fill("-1")
    desk.locator("#exact").fill("5000")
    desk.locator("#seed").fill("4")
    expect(desk.locator("#numbers-error")).to_contain_text("got “900”")
    expect(desk.locator("[aria-invalid=true]")).to_have_count(2)
    desk.locator(button).click()
    expect(desk.locator("#length")).to_have_value("40")
    expect(desk.locator("[aria-invalid=true]")).to_have_count(0)
    for place in ("#coeff-error", "#numbers-error"):
        expect(desk.locator(place)).to_be_empty()


def test_the_slider_mends_a_wrong_coefficient(desk):
    desk.locator("#exact").fill("5000")
    expect(desk.locator("#exact")).to_have_attribute("aria-invalid", "true")
    desk.get_by_label("Coefficient", exact=True).press("ArrowLeft")
    expect(desk.locator("#exact")).to_have_attribute("aria-invalid", "false")


def test_a_wrong_link_is_told_and_the_rest_of_it_used(browser, built):
    hash = "layer=9&coeff=x&toward=Joy&colour=red&constructor=1&__proto__=2&sampled=true"
    with opened(browser, built, hash) as page:
        expect(page.locator("#problem")).to_contain_text("from 0 to 5 as the layer, got “9”")
        expect(page.locator("#problem")).to_contain_text("0 or 1 as sampled, got “true”")
        for name in ("colour", "constructor", "__proto__"):
            known = f"“{name}”, which this page does not know"
            expect(page.locator("#problem")).to_contain_text(known)
        expect(page.get_by_label("Toward", exact=True)).to_have_value("Joy")
        expect(page.get_by_label("Coefficient", exact=True)).to_have_value("15.6")


def test_what_a_link_brings_is_text(browser, built):
    """HTML in it stays letters, wherever it is shown."""
    html = "<img src=x><b>I think</b>"
    hash = urlencode({"prompt": html, "toward": html, "away": "x", "coeff": html, html: html})
    with opened(browser, built, hash) as page:
        wait(page, "counted")
        assert page.locator("img, b").count() == 0
        for card in CARDS:
            assert page.locator(card).text_content().startswith(html)
        expect(page.locator(".card.steered h3")).to_contain_text("Toward <img src=x>")
        expect(page.locator("#problem")).to_contain_text("<img src=x>")


def test_a_link_holds_the_settings(browser, built, desk):
    """What is set by hand comes back in another window, and is written there again."""
    desk.get_by_label("Prompt", exact=True).fill("To me, the harbour is")
    desk.get_by_label("sampled", exact=True).check()
    desk.get_by_label("2", exact=True).check()
    desk.get_by_label("Coefficient, as a number").fill("-9.5")
    desk.get_by_label("Text seed").fill("11")
    desk.wait_for_timeout(400)
    wait(desk, "counted")
    hash = desk.evaluate("location.hash")
    written = [desk.locator(card).text_content() for card in CARDS]
    with opened(browser, built, hash.removeprefix("#")) as page:
        wait(page, "counted")
        assert [page.locator(card).text_content() for card in CARDS] == written
        assert page.evaluate("location.hash") == hash
        expect(page.locator("#exact")).to_have_value("-9.5")
        expect(page.locator("input[name=layer]:checked")).to_have_value("2")


def test_tone_is_counted_over_sampled_texts(desk):
    """The bars say what the library counts in the texts that can be read below."""
    wait(desk, "counted")
    desk.get_by_text("Read them").click()
    desk.locator("#samples li").first.wait_for()
    for number, card in enumerate(("unsteered", "steered", "random")):
        section = desk.locator("#samples section").nth(number)
        signs = tone_sign(section.locator("li").all_text_contents())
        assert len(signs) == 24, card
        bar = desk.locator(".stack").nth(number).get_attribute("aria-label")
        counts = [signs.count(sign) for sign in (1, 0, -1)]
        assert [int(it) for it in re.findall(r"(\d+) (?:pos|nei|neg)", bar)] == counts
    desk.get_by_role("button", name="24 more").click()
    expect(desk.locator("#tone-notes")).to_contain_text("48 texts each", timeout=PATIENCE)


def test_the_map_fills_and_steers(desk):
    """It fills while one watches; unsteered is the same on every layer; a cell is a place to go."""
    wait(desk, "counted")
    desk.get_by_role("button", name="Fill the map").click()
    sampled = desk.locator("#map button[class]")
    expect(sampled).not_to_have_count(0)
    assert desk.locator("#map button").count() == 42 > sampled.count()
    desk.locator("body[data-map=full]").wait_for(timeout=10 * PATIENCE)
    assert sampled.count() == 42
    shares = {
        (int(it["layer"]), float(it["coeff"])): float(it["share"].replace("−", "-"))
        for it in desk.locator("#map button").evaluate_all(
            "all => all.map(it => ({ ...it.dataset, share: it.textContent }))"
        )
    }
    assert len({shares[layer, 0] for layer in range(6)}) == 1
    preset = known_preset("embedded")
    assert shares[preset.layer, preset.coeff] > 0.5 > -0.5 > shares[preset.layer, -preset.coeff]
    desk.locator('#map [data-layer="2"][data-coeff="-15.6"]').click()
    expect(desk.get_by_label("Coefficient, as a number")).to_have_value("-15.6")
    expect(desk.locator("input[name=layer]:checked")).to_have_value("2")
    expect(desk.locator(".card.steered h3")).to_have_text("Toward Hate, −15.6")
    assert sampled.count() == 42  # it belongs to the prompt and the pair, which are the same


def test_a_map_that_is_refused_is_not_awaited(desk):
    desk.get_by_label("Prompt", exact=True).fill("")
    wait(desk, "refused")
    desk.get_by_role("button", name="Fill the map").click()
    expect(desk.locator("#fill")).to_have_text("Fill the map")
    expect(desk.locator("#prompt-error")).to_contain_text("is empty")


def test_a_fault_of_the_worker_is_told(browser, built):
    """Also of one inside of a task; and the page can still be used."""
    with browser.new_context() as context:
        page = context.new_page()
        page.add_init_script("""
          const send = Worker.prototype.postMessage;
          Worker.prototype.postMessage = function (message) {
            const layer = window.layer ?? message.settings?.layer;
            send.call(this, { ...message, settings: { ...message.settings, layer } });
          };
        """)
        page.goto(built.as_uri())
        wait(page, "written")
        page.evaluate("window.layer = 99")
        page.get_by_label("Prompt", exact=True).fill("I think")
        expect(page.locator("#problem")).to_contain_text("The page has a fault of its own")
        wait(page, "failed")
        page.evaluate("window.layer = undefined")
        page.get_by_label("Prompt", exact=True).fill("I hope")
        expect(page.locator(CARDS[0])).to_contain_text("I hope")


def test_where_the_pair_differs(desk, model, tokenizer):
    """Nowhere before the first other token; and each number is the library's."""
    desk.get_by_label("Toward", exact=True).fill("I love you")
    desk.get_by_label("Away from", exact=True).fill("I hate you")
    expect(desk.locator("#differences .away td.token").nth(1)).to_have_text("·hate")
    rows = desk.locator("#differences tbody tr")
    for layer in range(6):
        cells = rows.nth(5 - layer).locator("td").all_text_contents()
        states = [
            model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            for text in ("I love you", "I hate you")
        ]
        # After the last block they are normalised; that block is left out.
        if layer < 5:
            one, other = (state.hidden_states[layer + 1][0] for state in states)
            share = 2 * (one - other).norm(dim=-1) / (one.norm(dim=-1) + other.norm(dim=-1))
            torch.testing.assert_close(
                torch.tensor([float(it) for it in cells]), share.detach(), rtol=0, atol=0.0051
            )
        assert cells[0] == "0.00" and float(cells[2]) > 0.05


def test_a_vector_is_saved_and_dropped_in_again(desk, tmp_path, model, tokenizer):
    """The library reads the file; dropped in, it steers as before, and is saved unchanged."""
    written = [desk.locator(card).text_content() for card in CARDS]
    with desk.expect_download() as saving:
        desk.get_by_role("button", name="Save vector").click()
    path = tmp_path / saving.value.suggested_filename
    saving.value.save_as(path)
    assert path.name == "love-hate-layer-3.safetensors"
    vector = SteeringVector.load(path)
    inputs = tokenizer(FIRST_PROMPT, return_tensors="pt")
    with vector.apply(model, multiplier=15.6):
        ids = generate(model, inputs, max_new_tokens=40)
    assert written[1] == FIRST_PROMPT + completions(tokenizer, inputs, ids)[0]

    drop = """content => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([Uint8Array.from(content)], "dropped.safetensors"));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
    }"""
    desk.evaluate(drop, list(path.read_bytes()))
    expect(desk.locator(".card.steered h3")).to_have_text("By the file, +15.6")
    wait(desk, "written")
    assert [desk.locator(card).text_content() for card in CARDS] == written
    with desk.expect_download() as saving:
        desk.get_by_role("button", name="Save vector").click()
    saving.value.save_as(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()

    # A file that is none is refused, and the one that steers stays.
    desk.evaluate(drop, list(b"nothing of the kind"))
    expect(desk.locator("#file-error")).to_contain_text("is not a complete safetensors file")
    expect(desk.locator(".card.steered h3")).to_have_text("By the file, +15.6")
    desk.get_by_role("button", name="Back to the pair").click()
    expect(desk.locator(".card.steered h3")).to_have_text("Toward Love, +15.6")


def test_what_is_dropped_and_cannot_be_read_is_told(desk):
    """A folder looks like a file; a text is left to the field that it is dropped on."""
    prevented = desk.evaluate("""() => {
      const drop = (place, dataTransfer) => {
        const event = new DragEvent("drop", { bubbles: true, cancelable: true });
        Object.defineProperty(event, "dataTransfer", { value: dataTransfer });
        return !document.querySelector(place).dispatchEvent(event);
      };
      const folder = { name: "folder", size: 4096, arrayBuffer: () => Promise.reject(new Error()) };
      return [
        drop("#prompt", { types: ["text/plain"], files: [] }),
        drop("#prompt", { types: ["Files"], files: [folder] }),
      ];
    }""")
    assert prevented == [False, True]
    expect(desk.locator("#file-error")).to_contain_text("“folder” cannot be read")


def test_a_vector_of_another_size_steers_as_in_the_library(desk, tmp_path, model, tokenizer):
    """Its coefficient is then its norm, and the text that of a multiplier of 1."""
    pairs = [("The garden is delightful", "The garden is horrible"), ("Joy", "Misery")]
    vector = train_steering_vector(model, tokenizer, pairs, layers=[1, 3])
    vector.save(tmp_path / "two.safetensors")
    inputs = tokenizer(FIRST_PROMPT, return_tensors="pt")
    with vector.apply(model):
        ids = generate(model, inputs, max_new_tokens=40)
    desk.locator("#file").set_input_files(tmp_path / "two.safetensors")
    expect(desk.locator("#layer-notes")).to_have_text("As in the file: after block 1, 3.")
    assert desk.locator("input[name=layer]:checked").count() == 0
    wait(desk, "written")
    text = FIRST_PROMPT + completions(tokenizer, inputs, ids)[0]
    expect(desk.locator(CARDS[1])).to_have_text(text)
    size = max(vector.norm().values())
    assert float(desk.locator("#exact").input_value()) == pytest.approx(size, rel=1e-5)


def test_without_a_text_there_is_no_program(desk, tokenizer):
    """After a prompt that fills the model, and after one that is refused."""
    full = "I" + " think" * 255
    assert len(tokenizer(full)["input_ids"]) == 256
    desk.get_by_label("Prompt", exact=True).fill(full)
    expect(desk.locator("#code")).to_have_text(re.compile("all 256 positions: no text can follow"))
    desk.get_by_label("Prompt", exact=True).fill("")
    wait(desk, "refused")
    expect(desk.locator("#code")).to_have_text("")
    assert desk.locator("#tokens span").count() == 0


def test_the_program_writes_the_text_of_the_page(desk, capsys):
    desk.get_by_label("Prompt", exact=True).fill('I said "no", and\tthe soup is')
    desk.wait_for_timeout(400)
    wait(desk, "written")
    exec(compile(desk.locator("#code").text_content(), "the page", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.endswith(f"{desk.locator(CARDS[1]).text_content()}\n")


def test_the_keyboard_reaches_everything(desk):
    """In the order of the page; arrow keys choose a layer, move the coefficient and the map."""
    wait(desk, "counted")  # a button waits for it
    desk.keyboard.press("Tab")
    expect(desk.get_by_text("Skip to the texts")).to_be_focused()
    reached = []
    for _ in range(60):
        desk.keyboard.press("Tab")
        name = desk.evaluate("""() => {
          const it = document.activeElement;
          return it.id || it.name || it.dataset.coeff || it.tagName.toLowerCase();
        }""")
        if name == "body":
            break
        reached.append(name)
    settings = ["prompts", "prompt", "pairs", "toward", "swap", "away", "save", "open", "layer"]
    settings += ["preset", "exact", "coeff", "summary", "sampled", "length", "seed", "random"]
    settings += ["link", "reset"]
    assert reached[: len(settings)] == settings
    assert {"more", "fill", "15.6", "copy"} <= set(reached)

    desk.locator("input[name=layer]:checked").focus()
    desk.keyboard.press("ArrowLeft")
    expect(desk.locator("input[name=layer]:checked")).to_have_value("2")
    desk.get_by_label("Coefficient", exact=True).focus()
    desk.keyboard.press("Home")
    expect(desk.locator("#exact")).to_have_value("-30")
    expect(desk.locator(".card.steered h3")).to_have_text("Toward Hate, −30")
    desk.get_by_role("button", name="preset").press("Enter")
    desk.locator("#map [tabindex='0']").focus()
    for key in ("ArrowUp", "ArrowLeft", "Enter"):
        desk.keyboard.press(key)
    expect(desk.locator("#exact")).to_have_value("7.8")
    expect(desk.locator("input[name=layer]:checked")).to_have_value("4")
    focused = desk.evaluate("({ ...document.activeElement.dataset })")
    assert focused == {"layer": "4", "coeff": "7.8"}


def test_skipping_to_the_texts_changes_nothing_else(desk):
    desk.get_by_label("Prompt", exact=True).fill("To me, the harbour is")
    expect(desk.locator(CARDS[1])).to_contain_text("To me, the harbour is")
    wait(desk, "written")
    address = desk.url
    desk.get_by_text("Skip to the texts").focus()
    desk.keyboard.press("Enter")
    expect(desk.locator("#results")).to_be_focused()
    expect(desk.locator("#problem")).to_be_empty()
    assert desk.get_by_label("Prompt", exact=True).input_value() == "To me, the harbour is"
    assert desk.url == address


def test_screen_readers_are_told(desk):
    """Headings and regions have names, and what was counted is said once it is there."""
    wait(desk, "counted")
    said = desk.get_by_role("status").text_content()
    assert re.match(r"Of 24 sampled texts each: Unsteered: \d+ positive, \d+ negative\. To", said)
    headings = desk.get_by_role("heading").all_text_contents()
    assert headings[0] == "Steer it yourself" and "The next token" in headings
    cell = desk.locator('#map [data-layer="3"][data-coeff="15.6"]')
    label = "layer 3, coefficient +15.6: not sampled yet"
    assert cell.get_attribute("aria-label") == label
    assert cell.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(browser, built, width, scheme):
    options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    with opened(browser, built, bypass_csp=True, **options) as page:
        wait(page, "counted")
        page.get_by_text("Read them").click()
        page.get_by_role("button", name="Fill the map").click()
        expect(page.locator("#map .filled").first).to_be_visible()
        assert_accessible(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser, built, scheme):
    """And every field and button is inside of it, large enough for a finger."""
    phone = {"width": 390, "height": 844}
    with opened(browser, built, viewport=phone, color_scheme=scheme, has_touch=True) as page:
        wait(page, "counted")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") != scheme
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert (sum(map(int, re.findall(r"\d+", ink))) > 400) == (scheme == "dark")
        for it in page.locator("input:visible, select:visible, button:visible").all():
            box = it.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, it
            if not it.evaluate("it => it.matches('.quiet')"):
                assert box["height"] >= 24, it


def test_a_narrow_phone_breaks_long_words(browser, built):
    """Whoever reads at 400 % has 320 pixels; no word is too long for them."""
    word = "Kraftfahrzeughaftpflichtversicherung" * 2
    hash = urlencode({"prompt": word, "toward": word, "away": "x", word: 1})
    phone = {"width": 320, "height": 700}
    with opened(browser, built, hash, viewport=phone, has_touch=True, is_mobile=True) as page:
        wait(page, "counted")
        expect(page.locator("#problem")).to_contain_text(word)
        expect(page.locator("#prompt-notes")).to_contain_text(word)
        assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_with_reduced_motion_nothing_moves(browser, built):
    """No animation; and a text is shown when it is whole."""
    with opened(browser, built, reduced_motion="reduce") as page:
        shown = page.evaluate("""() => new Promise(resolve => {
          const seen = [];
          const place = document.querySelector(".card.steered .text");
          new MutationObserver(() => seen.push(place.textContent))
            .observe(place, { childList: true });
          const look = () => document.body.dataset.state === "counted"
            ? resolve(seen) : setTimeout(look, 50);
          look();
        })""")
        assert page.evaluate("document.getAnimations().length") == 0
    assert len([text for text in shown if text.startswith(FIRST_PROMPT)]) == 1


def test_the_colours_are_the_librarys(desk):
    """Love is red and Hate is blue, as in every picture."""
    colour = "getComputedStyle(document.querySelector('.card.steered')).borderTopColor"
    assert desk.evaluate(colour) == "rgb(214, 39, 40)"
    desk.get_by_label("Coefficient, as a number").fill("-15.6")
    expect(desk.locator(".card.steered h3")).to_have_text("Toward Hate, −15.6")
    assert desk.evaluate(colour) == "rgb(31, 119, 180)"


def test_suggestions_are_the_projects(desk):
    known = project()
    options = desk.locator("#prompts option").all_text_contents()
    assert options[1:] == known["prompts"]
    pairs = desk.locator("#pairs option").evaluate_all("all => all.map(it => it.value)")
    expected = [("Love", "Hate"), *(pair for group in known["pairs"].values() for pair in group)]
    assert [tuple(json.loads(it)) for it in pairs[1:]] == expected
    desk.locator("#pairs").select_option(label="Joy − Misery")
    expect(desk.get_by_label("Toward", exact=True)).to_have_value("Joy")
    expect(desk.locator(".card.steered h3")).to_have_text("Toward Joy, +15.6")
