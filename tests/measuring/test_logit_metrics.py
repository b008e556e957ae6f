"""Metrics of the next token say what the probabilities say."""

import pytest
import torch

from common import (
    Grid,
    ab_metric,
    mean_logprob,
    next_token_probs,
    sweep_logits,
    token_logprob,
    train_steering_vector,
)
from common.measuring.next_token import token_set

PROMPTS = ["I think dogs are", "My neighbour is"]


@pytest.fixture(scope="module")
def vector(model, tokenizer):
    return train_steering_vector(model, tokenizer, [("Love", "Hate")], [3])


def test_metrics_of_a_sweep_are_made_of_probabilities(model, tokenizer, vector):
    """Steered and unsteered, with and without a blank in front of each word."""
    nice, bad = ["wonderful", "lovely"], "awful"
    metrics = {
        "ab": ab_metric(tokenizer, nice, bad),
        "mean": mean_logprob(tokenizer, nice),
        "sum": token_logprob(token_set(tokenizer, nice)),
    }
    rows = sweep_logits(model, tokenizer, Grid({"v": vector}, None, [4.0]), PROMPTS, metrics)
    for row in rows.itertuples():
        steered = (lambda: vector.apply(model, multiplier=4.0)) if row.coeff else None
        probs = next_token_probs(model, tokenizer, row.prompt, steered, None)[-1]
        each = [probs[token_set(tokenizer, [word])].sum().log() for word in [*nice, bad]]
        summed = torch.logaddexp(each[0], each[1])
        assert row.ab == pytest.approx((summed - each[2]).item(), abs=1e-4)
        assert row.mean == pytest.approx(((each[0] + each[1]) / 2).item(), abs=1e-4)
        assert row.sum == pytest.approx(summed.item(), abs=1e-4)
    by_coeff = rows.groupby("coeff")["ab"].mean()
    assert by_coeff[4.0] > by_coeff[0.0] + 1


def test_turned_around_the_choice_is_its_negative(tokenizer):
    logits = torch.randn(3, len(tokenizer), generator=torch.Generator().manual_seed(0))
    one, other = (
        ab_metric(tokenizer, *answers)(logits, logits)
        for answers in (("good", "bad"), ("bad", "good"))
    )
    torch.testing.assert_close(one, -other)
    shifted = ab_metric(tokenizer, "good", "bad")(logits + 5.0, logits)
    torch.testing.assert_close(one, shifted)  # it is a difference of logits


def test_words_that_are_no_answers_are_refused(tokenizer):
    with pytest.raises(ValueError, match="is not a single token"):
        ab_metric(tokenizer, "good", "a whole sentence")
    with pytest.raises(ValueError, match="is an answer of both"):
        ab_metric(tokenizer, ["good", "bad"], "bad")
    for nothing in ([], "good"):
        with pytest.raises(ValueError, match="list of answers"):
            mean_logprob(tokenizer, nothing)
