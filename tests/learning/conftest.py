"""What all that is learned learns on."""

import pytest
from architectures import tiny_model

from common.checking.pristine import assert_pristine, snapshot


@pytest.fixture(scope="module")
def small(tokenizer):
    """A tiny GPT-2 with random weights, which every test leaves as it was."""
    model = tiny_model("GPT-2", len(tokenizer))
    before = snapshot(model)
    yield model
    assert_pristine(model, before)
    assert all(weight.grad is None for weight in model.parameters())
