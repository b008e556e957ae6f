"""Tables in the notebooks: which side a column stands on, and what becomes of its values."""

import pandas as pd
import pytest

from repository.tables import show_table


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("repository.tables.display", lambda data, raw: found.append(data))
    return found


def test_text_stands_left_and_numbers_right(shown):
    frame = pd.DataFrame({"name": ["a & b", None], "count": [1, 10], "share": [0.5, 0.25]})
    show_table(frame)
    show_table(dict(frame.items()), decimals=0)
    assert shown[0]["text/plain"] == "name   count  share\na & b      1   0.50\n          10   0.25"
    lines = shown[0]["text/html"].splitlines()
    assert lines[2] == (
        '<tr><td style="text-align: left">a &amp; b</td><td style="text-align: right">1</td>'
        '<td style="text-align: right">0.50</td></tr>'
    )
    assert len(lines) == 5 and "0.50" not in shown[1]["text/html"]


def test_index_is_the_first_column_where_it_is_wanted(shown):
    frame = pd.DataFrame({"x": [1]}, index=pd.Index(["first"], name="row"))
    show_table(frame, index=True)
    assert shown[0]["text/plain"] == "row    x\nfirst  1"
