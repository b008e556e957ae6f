"""What the tests of the playground share: the page, and what the library says to the cases."""

from pathlib import Path

import pytest
from page_reference import Answer, Case, answer, many_cases

from repository.playground import main


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The page as `make playground` writes it."""
    path = tmp_path_factory.mktemp("playground") / "index.html"
    assert main(["--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def cases(model) -> list[Case]:
    return many_cases(model.config.n_layer)


@pytest.fixture(scope="session")
def answers(model, tokenizer, cases) -> list[Answer | None]:
    return [answer(model, tokenizer, case) for case in cases]
