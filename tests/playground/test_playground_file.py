"""The playground's one file: complete, with what the library knows, and nothing from the net."""

import base64
import itertools
import json
import re

import pytest

from common.embedded import FOLDER
from embedded_model import grammar
from repository import playground


def part(page: str, name: str) -> str:
    return re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.DOTALL)[1]


@pytest.fixture(scope="module")
def page(built) -> str:
    return built.read_text(encoding="utf-8")


def test_weights_and_tokenizer_are_those_that_are_shipped(page):
    weights = base64.b64decode(part(page, "weights"), validate=True)
    assert weights == (FOLDER / "model.safetensors").read_bytes()
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(part(page, "tokenizer")) == tokenizer
    assert json.loads(part(page, "project")) == json.loads(json.dumps(playground.project()))


def test_the_page_needs_nothing_else(page):
    """No address but those of names (xmlns), no module left to be loaded, no slot left empty."""
    rest = page.replace(part(page, "weights"), "").replace(part(page, "tokenizer"), "")
    assert set(re.findall(r"https?://[^\s'\"]+", rest)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"^(?:import|export) |<!-- \w+ -->", rest, re.MULTILINE)
    assert "connect-src" not in rest and "default-src 'none'" in rest


@pytest.mark.parametrize("entry", ["page.js", "worker.js"])
def test_a_module_stands_once_and_after_what_it_imports(entry):
    order = re.findall(r"^// (\w+\.js)$", playground.bundle(entry), re.MULTILINE)
    assert len(set(order)) == len(order) >= 4 and order[-1] == entry
    for number, name in enumerate(order):
        text = (playground.SOURCES / name).read_text(encoding="utf-8")
        imported = re.findall(r'from "\./([\w.]+)"', text)
        assert set(imported) <= set(order[:number]), name


def test_every_module_and_slot_is_used():
    used = {
        name
        for entry in ("page.js", "worker.js")
        for name in re.findall(r"^// (\w+\.js)$", playground.bundle(entry), re.MULTILINE)
    }
    assert used == {path.name for path in playground.SOURCES.glob("*.js")}


def test_a_text_that_ends_its_element_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(playground, "bundle", lambda name: 'const end = "</script>";')
    with pytest.raises(ValueError, match=r"inside \['page', 'worker'\]"):
        playground.page()


def test_two_things_of_one_name_are_refused(monkeypatch, tmp_path):
    """In one script the later would take the place of the earlier, or nothing would run."""
    (tmp_path / "one.js").write_text('import { a } from "./two.js";\nfunction b() {}\n')
    (tmp_path / "two.js").write_text("export const a = 1;\nlet b = 2;\n")
    monkeypatch.setattr(playground, "SOURCES", tmp_path)
    with pytest.raises(ValueError, match=r"in one\.js and what it imports, got \['b'\]"):
        playground.bundle("one.js")


def test_taught_words_are_those_of_the_grammar():
    """Of documents that were not read, all words are taught but made-up ones and very rare ones."""
    taught = set(playground.taught_words())
    documents = list(itertools.islice(grammar.documents(5), 2000))
    total = sum(len(playground.words(text)) for text in documents)
    strange = [word for text in documents for word in playground.words(text) - taught]
    syllables, finals = "|".join(grammar.SYLLABLES), "|".join(filter(None, grammar.FINALS))
    made_up = re.compile(rf"(?:{syllables}){{1,3}}(?:{finals})?s?")
    rare = [word for word in strange if not made_up.fullmatch(word)]
    assert len(strange) > 50 and len(rare) < total / 10_000
    assert not taught & {"plumber", "penguin", "time", "fact", "any", "verb", "aeio"}
