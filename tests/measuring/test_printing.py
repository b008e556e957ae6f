"""Texts below each other: nothing of them is lost, and no line is too wide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from common.measuring.printing import print_texts
from common.measuring.tone import mark_tone

ODD = ["\n", "\r", "\t", "\x07", "\x1b[31m", "\xa0", "\u3000", "\u200b", "\u2028", "\\n", "\\"]
WIDE = ["漢字", "é", "🙂", "x" * 300, "漢" * 150]


def printed(capsys, *arguments, **options) -> list[str]:
    """The printed lines below the legend."""
    capsys.readouterr()
    print_texts(*arguments, **options)
    legend, *lines = capsys.readouterr().out.split("\n")
    positive, negative = (mark_tone(word)[0] for word in ("love", "hate"))
    assert legend.startswith(f"{positive} counts as positive, {negative} as negative;")
    return lines


@given(data=st.data())
def test_lines_fit_and_hold_the_whole_text(data):
    """Whatever the text, its lines without blanks are the text, with escapes that Python reads."""
    parts = st.sampled_from([*ODD, *WIDE, "door", " a", " "]) | st.text(max_size=5)
    text = data.draw(st.lists(parts, max_size=12).map("".join))
    width = data.draw(st.integers(40, 120))
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *given, sep=" ": lines.append(sep.join(given)))
        print_texts(["I"], {"unsteered": [text]}, width)
    lines = "\n".join(lines).split("\n")[3:]
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].startswith("  unsteered  ")
    assert all(line.isprintable() and line[:13].isspace() for line in lines[1:])
    found = "".join(line[13:] for line in lines).replace("▲", "").replace("▼", "")
    shown = "".join(
        sign if sign.isprintable() and sign != "\\" else ascii(sign)[1:-1] for sign in text
    )
    assert found.replace(" ", "") == (shown.replace(" ", "") or "(nothing)")


def test_a_prompt_has_its_texts_below_it(capsys):
    """One paragraph for each prompt; all texts begin in one column, marked."""
    texts = {"unsteered": [" a door.", ""], "− to Hate": [" I hate it", "  "], "漢字": ["1", "2"]}
    assert printed(capsys, ["I think ", "You\n"], texts) == [
        "",
        "'I think '",
        "  unsteered  a door.",
        "  − to Hate  I ▼hate it",
        "  漢字       1",
        "",
        r"'You\n'",
        "  unsteered  (nothing)",
        "  − to Hate  (nothing)",
        "  漢字       2",
        "",
    ]


def test_further_lines_hang(capsys):
    """They begin where the text began; a long prompt is broken too."""
    lines = printed(capsys, ["word " * 10], {"to Love": ["many words " * 5]}, width=40)
    assert lines == [
        "",
        "'word word word word word word word word",
        "word word '",
        "  to Love  many words many words many",
        "           words many words many words",
        "",
    ]


def test_a_label_stays_on_its_line(capsys):
    """What is not seen, or would break the line, is written out there too; markup is text."""
    texts = {"a\nb": [" x"], "[red]c[/b]": [" [/b] y"], "": [" z"]}
    assert printed(capsys, ["I"], texts)[2:] == [
        r"  a\nb        x",
        "  [red]c[/b]  [/b] y",
        "              z",
        "",
    ]


def test_a_single_text_is_not_a_list():
    """Its letters are no texts, even where their number fits."""
    for prompts, texts in (("ab", ["x", "y"]), (["I"], "x"), (["I", "You"], "xy")):
        with pytest.raises(ValueError, match="expected a list of"):
            print_texts(prompts, {"to Love": texts})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one text of 'to Love' for each of the 2 prompts, got 1"):
        print_texts(["I", "You"], {"to Love": ["one"]})
    with pytest.raises(ValueError, match="one text of 'to Hate' for each of the 1 prompts, got 2"):
        print_texts(["I"], {"to Love": ["one"], "to Hate": ["one", "two"]})
    with pytest.raises(ValueError, match="a width of at least 31, got 30"):
        print_texts(["I"], {"to Love": ["one"]}, width=30)
    print_texts(["I"], {"to Love": ["one"]}, width=31)


def test_texts_begin_behind_the_widest_label(capsys):
    """In columns, not in signs; without a text there are the prompts."""
    lines = printed(capsys, ["I"], {"to": ["1"], "漢字": ["2"]})
    assert lines[2:4] == ["  to    1", "  漢字  2"]
    assert printed(capsys, ["I"], {}, width=24) == ["", "'I'", ""]


def test_lines_have_a_hundred_columns(capsys):
    """Unless another width is asked for."""
    lines = printed(capsys, ["I"], {"to Love": ["o" * 300]})
    assert [len(line) for line in lines[2:-2]] == [100] * 3


def test_what_is_written_as_an_escape_hides_no_tone(capsys):
    """The `n` of a line break belongs to no word."""
    assert printed(capsys, ["I"], {"to Love": ["a\nlove"]})[2] == r"  to Love  a\n▲love"
