"""Contrast pairs from tables, data sets and files are those that are written out by hand."""

import codecs
import json
from pathlib import Path

import pandas as pd
import pytest

from common import pairs_from, train_steering_vector
from common.vectors.pairs import SteeringVectorTrainingSample

ROWS = [
    {"love": "I love you", "hate": "I hate you", "more": 1},
    {"love": "NA, lovely\u2028day", "hate": "null", "more": 2},
]
CAA = [
    {"question": "Do you like dogs?", "yes": " (A)", "no": " (B)"},
    {"question": "Is it late?\n", "yes": " (B)", "no": " (A)"},
]


def texts(samples) -> list[tuple]:
    assert all(isinstance(sample, SteeringVectorTrainingSample) for sample in samples)
    return [(sample.positive_str, sample.negative_str) for sample in samples]


def files(folder):
    """The rows in every kind of file."""
    pd.DataFrame(ROWS).to_csv(folder / "rows.csv", index=False)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (folder / "rows.jsonl").write_text(lines + "\n", encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return [folder / "rows.csv", str(folder / "rows.jsonl"), folder / "rows.json"]


def test_every_source_gives_the_same_pairs(tmp_path):
    """Texts that look like gaps or line ends stay texts."""
    expected = [(row["love"], row["hate"]) for row in ROWS]
    for source in (ROWS, iter(ROWS), pd.DataFrame(ROWS), *files(tmp_path)):
        assert texts(pairs_from(source, "love", "hate")) == expected


def test_a_mark_in_front_is_no_text(tmp_path):
    """Excel writes a BOM at the beginning of a file."""
    expected = [(row["love"], row["hate"]) for row in ROWS]
    for path in map(Path, files(tmp_path)):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        assert texts(pairs_from(path, "love", "hate")) == expected


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a,b", "I love it, truly,I hate it, truly"], "row 0: expected 2 fields, a, b, got"),
        (["a,b,c", "1,2,3", "1,2,3,4"], "row 1: expected 3 fields"),
        (["a,b,c", "1,2,3", "1,2"], "row 1: expected 3 fields, a, b, c, got .*quotation marks"),
        (["a,b,a", "1,2,3"], "the column 'a' is there twice"),
        (["a,b", "1," + 200_000 * "2"], "field larger than"),
        ([""], "one pair or more"),
    ],
)
def test_a_csv_whose_columns_are_uncertain_is_refused(tmp_path, lines, message):
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        pairs_from(tmp_path / "rows.csv", "a", "b")


def test_a_data_set_of_hugging_face_is_a_source():
    datasets = pytest.importorskip("datasets")
    found = pairs_from(datasets.Dataset.from_list(ROWS), "love", "hate")
    assert texts(found) == [(row["love"], row["hate"]) for row in ROWS]


def test_questions_come_before_both_answers():
    """As texts joined as they are; in a chat the user asks and the assistant answers."""
    found = texts(pairs_from(CAA, "yes", "no", prompt="question"))
    assert found[0] == ("Do you like dogs? (A)", "Do you like dogs? (B)")
    assert found[1] == ("Is it late?\n (B)", "Is it late?\n (A)")
    asked = [{"role": "user", "content": CAA[0]["question"]}]
    answered = tuple(
        [*asked, {"role": "assistant", "content": answer}] for answer in (" (A)", " (B)")
    )
    assert texts(pairs_from(CAA[:1], "yes", "no", prompt="question", chat=True)) == [answered]
    system = [{"role": "system", "content": "Be brief."}, *asked]
    row = {"question": system, "yes": " (A)", "no": " (B)"}
    found = texts(pairs_from([row], "yes", "no", prompt="question"))
    assert found[0][0] == [*system, {"role": "assistant", "content": " (A)"}]
    assert row["question"] == system  # and the source stays as it is
    whole = [{"positive": answered[0], "negative": answered[1]}]
    assert texts(pairs_from(whole)) == [answered]


def test_pairs_train_a_vector(model, tokenizer):
    pairs = pairs_from(ROWS, "love", "hate")
    found = train_steering_vector(model, tokenizer, pairs, [2])
    by_hand = train_steering_vector(model, tokenizer, texts(pairs), [2])
    assert found.layer_activations[2].equal(by_hand.layer_activations[2])


@pytest.mark.parametrize(
    "source, options, message",
    [
        (ROWS, {}, "row 0: expected a column 'positive', got love, hate, more"),
        (ROWS, {"positive": "love", "negative": "more"}, "row 0: expected a text .* got 1"),
        ([{"positive": "", "negative": "b"}], {}, "row 0: expected a text or messages"),
        ([{"positive": "a", "negative": None}], {}, "got None"),
        (["a"], {}, "row 0: expected a column 'positive', got 'a'"),
        ([], {}, "one pair or more"),
        ({"train": ROWS}, {}, "expected a table, rows or a path"),
        (7, {}, "expected a table, rows or a path"),
        ("pairs.txt", {}, "expected a .csv, a .jsonl or a .json"),
        (ROWS, {"chat": True}, "the column of a prompt"),
    ],
)
def test_what_holds_no_pairs_is_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        pairs_from(source, **options)


def test_messages_do_not_follow_a_prompt():
    said = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="row 0: expected a text after a prompt"):
        pairs_from([{"p": "a", "positive": said, "negative": said}], prompt="p")
