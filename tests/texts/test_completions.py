"""Sampling that belongs to the row, completions as a table, and the table that people read."""

import re

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PROMPTS

from common import (
    complete,
    gen_normal_and_modified,
    gen_using_activation_additions,
    get_x_vector,
    pretty_print_completions,
    print_n_comparisons,
)
from common.checking.pristine import assert_pristine, snapshot
from common.passes.padding import encode
from common.texts.completions import side_by_side
from common.texts.generation import generate
from common.texts.sampling import FrequencyPenalty, PerRow, Sampling, SeededSampling, sample
from common.vectors.activation_additions import apply_activation_additions, with_bos
from common.vectors.steering_vector import SteeringVector

SAMPLING = {"temperature": 0.9, "top_p": 0.8, "freq_penalty": 1.0, "repetition_penalty": 1.1}
PROMPT = "I went up to my friend and said"


@pytest.fixture(scope="module")
def additions():
    return get_x_vector("Love", "Hate", 3, 4)


# --- sampling ---


@given(
    logits=st.lists(st.floats(-4, 4), min_size=2, max_size=6),
    cut=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_samples_follow_the_softmax(logits, cut, seed):
    """Shares of 4000 samples lie within five standard errors of the probabilities.

    What is cut off never comes.
    """
    logits, count = torch.tensor(logits), 4000
    logits[cut % len(logits)] = -torch.inf
    scores = SeededSampling([(seed, row) for row in range(count)])(
        torch.zeros(count, 1), logits.expand(count, -1)
    )
    probs = logits.softmax(-1)
    shares = scores.argmax(-1).bincount(minlength=len(logits)) / count
    assert ((shares - probs).abs() <= 5 * (probs * (1 - probs) / count).sqrt() + 1e-6).all()


@given(order=st.permutations(range(3)))
def test_a_row_gets_its_text_in_any_batch(model, tokenizer, order):
    """Whatever else is in the batch, in whatever order, with whatever padding.

    With penalties that count tokens as well.
    """
    texts = complete_ids(model, tokenizer, [PROMPTS[i] for i in order], [(7, i) for i in order])
    for place, i in enumerate(order):
        assert texts[place] == complete_ids(model, tokenizer, [PROMPTS[i]], [(7, i)])[0]


def complete_ids(model, tokenizer, prompts, seeds) -> list[list[int]]:
    inputs = encode(tokenizer, prompts)
    return sample(model, inputs, seeds, Sampling(max_new_tokens=10, **SAMPLING))[
        :, inputs["input_ids"].shape[1] :
    ].tolist()


def test_equal_seeds_give_equal_noise_and_others_do_not(model, tokenizer):
    texts = complete_ids(model, tokenizer, [PROMPT] * 4, [1, 1, 2, (1, 5)])
    assert texts[0] == texts[1] and texts[0] != texts[2] and texts[0] != texts[3]


@pytest.mark.parametrize("seed", [0, None])
def test_the_global_random_state_is_not_touched(model, tokenizer, seed):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = complete(model, tokenizer, [PROMPT], seed=seed, sampling=Sampling(max_new_tokens=5))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    second = complete(model, tokenizer, [PROMPT], seed=seed, sampling=Sampling(max_new_tokens=5))
    assert first.equals(second) == (seed is not None)


def test_temperature_0_is_greedy(model, tokenizer):
    inputs = encode(tokenizer, PROMPTS)
    assert torch.equal(
        sample(model, inputs, [1, 2, 3], Sampling(temperature=0, max_new_tokens=8)),
        generate(model, inputs, max_new_tokens=8),
    )


def test_top_p_keeps_the_likeliest(model, tokenizer):
    """A tiny top_p leaves one token, which is greedy."""
    inputs = encode(tokenizer, PROMPTS)
    assert torch.equal(
        sample(model, inputs, [1, 2, 3], Sampling(top_p=1e-6, max_new_tokens=8)),
        generate(model, inputs, max_new_tokens=8),
    )


def test_penalties_do_not_count_padding(model, tokenizer):
    """Padding is the end of text; a padded row must not be kept from ending."""
    seen = []

    class Look:
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return scores

    inputs = encode(tokenizer, ["I", "I think that they are the old garden"], prepend_bos=False)
    sample(
        model,
        inputs,
        [1, 1],
        Sampling(temperature=0, freq_penalty=5.0, max_new_tokens=1),
        logits_processor=[Look()],
    )
    alone = model(torch.tensor([tokenizer("I")["input_ids"]])).logits[0, -1]
    penalised = PerRow(FrequencyPenalty(5.0), inputs["attention_mask"])(
        inputs["input_ids"], seen[0]
    )[0]
    end = tokenizer.eos_token_id
    assert torch.allclose(penalised[end], alone[end], atol=1e-4)
    assert FrequencyPenalty(5.0)(inputs["input_ids"], seen[0])[0, end] < alone[end] - 20


@pytest.mark.parametrize(
    "given, says",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"freq_penalty": -1}, "frequency penalty"),
        ({"repetition_penalty": 0}, "repetition penalty"),
        ({"tokens_to_generate": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, tokenizer, additions, given, says):
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        gen_using_activation_additions(
            model, tokenizer, [PROMPT], additions, **{"seed": 0, **given}
        )
    assert_pristine(model, before)


@pytest.mark.parametrize("option", [{"temperature": 0.5}, {"max_new_tokens": 3}, {"top_p": 0.9}])
def test_settings_outside_their_value_are_refused(model, tokenizer, option):
    """`generate` would take them as its own, and pass over most of them."""
    with pytest.raises(ValueError, match=rf"Sampling\({next(iter(option))}="):
        sample(model, encode(tokenizer, [PROMPT]), [1], **option)


def test_another_number_of_seeds_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="one seed for each of 1 rows, got 2"):
        sample(model, encode(tokenizer, [PROMPT]), [1, 2])


@pytest.mark.parametrize(
    "prompts, given, says",
    [
        ([], {}, "list of prompts"),
        ("I think", {}, "list of prompts"),
        ([3], {}, "expected texts"),
        (["I", ""], {"prepend_bos": False}, "empty"),
    ],
)
def test_wrong_prompts_are_refused(model, tokenizer, prompts, given, says):
    with pytest.raises(ValueError, match=says):
        complete(model, tokenizer, prompts, **given)


# --- completions as a table ---


def test_bos_is_in_front_once(tokenizer):
    assert encode(tokenizer, [PROMPT])["input_ids"][0].tolist() == with_bos(tokenizer, PROMPT)
    assert (
        encode(tokenizer, [PROMPT], prepend_bos=False)["input_ids"][0].tolist()
        == with_bos(tokenizer, PROMPT)[1:]
    )


def test_columns_and_loss(model, tokenizer, additions):
    """The loss is that of the whole text, under the steering, beside the unsteered one.

    As a plain pass gives it.
    """
    frame = gen_using_activation_additions(
        model,
        tokenizer,
        ["I hate you because", PROMPT],
        additions,
        temperature=0,
        tokens_to_generate=9,
        include_logits=True,
    )
    assert list(frame.columns) == [
        "prompts",
        "completions",
        "loss",
        "unsteered_loss",
        "is_modified",
        "logits",
    ]
    assert frame["is_modified"].all()
    with apply_activation_additions(model, tokenizer, additions):
        inputs = encode(tokenizer, frame["prompts"].tolist())
        written = sample(model, inputs, [0, 0], Sampling(temperature=0, max_new_tokens=9))
    for row in frame.itertuples():
        ids = written[
            row.Index : row.Index + 1, int((inputs["attention_mask"][row.Index] == 0).sum()) :
        ]
        with torch.no_grad():
            plain = model(ids, labels=ids).loss.item()
            with apply_activation_additions(model, tokenizer, additions):
                steered = model(ids, labels=ids)
        assert row.unsteered_loss == pytest.approx(plain, abs=1e-4)
        assert row.loss == pytest.approx(steered.loss.item(), abs=1e-4)
        assert torch.allclose(row.logits, steered.logits[0], atol=1e-3)
        assert abs(row.loss - row.unsteered_loss) > 0.01


@pytest.mark.parametrize("location", ["mid", "back"])
def test_loss_is_measured_where_the_addition_was(model, tokenizer, additions, location):
    """Counted from the end of the prompt, not of the whole text."""
    frame = gen_using_activation_additions(
        model,
        tokenizer,
        [PROMPT],
        additions,
        location,
        seed=0,
        tokens_to_generate=6,
        include_logits=True,
    )
    prompt, length = encode(tokenizer, [PROMPT]), len(with_bos(tokenizer, PROMPT))
    with torch.no_grad(), apply_activation_additions(model, tokenizer, additions, location):
        first = model(prompt["input_ids"]).logits[0]
    assert torch.allclose(frame["logits"][0][:length], first, atol=1e-4)


def test_what_comes_behind_the_end_of_text_does_not_count(model, tokenizer, monkeypatch):
    """Rows that end early are filled up; their loss is that of the text alone."""
    text = tokenizer(" the wedding was short.")["input_ids"] + [tokenizer.eos_token_id]

    def ended(model, inputs, seeds, *settings, **options):
        new = torch.tensor([text + [tokenizer.eos_token_id] * 5]).expand(len(seeds), -1)
        return torch.cat([inputs["input_ids"], new], dim=1)

    monkeypatch.setattr("common.texts.completions.sample", ended)
    frame = complete(model, tokenizer, [PROMPT])
    ids = torch.tensor([with_bos(tokenizer, PROMPT) + text])
    assert frame["loss"][0] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-4)


def test_loss_of_a_padded_row_is_its_own(model, tokenizer):
    prompts = list(PROMPTS)
    together = complete(
        model, tokenizer, prompts, seed=3, sampling=Sampling(max_new_tokens=8, temperature=0)
    )
    for row, prompt in enumerate(prompts):
        alone = complete(
            model, tokenizer, [prompt], seed=3, sampling=Sampling(max_new_tokens=8, temperature=0)
        )
        assert alone["completions"][0] == together["completions"][row]
        assert alone["loss"][0] == pytest.approx(together["loss"][row], abs=1e-4)


def test_without_additions_both_halves_are_equal(model, tokenizer):
    """Coefficient 0 steers nothing, and the same seed gives the same texts.

    They differ by the steering only.
    """
    frame = gen_normal_and_modified(
        model,
        tokenizer,
        [PROMPT] * 3,
        get_x_vector("Love", "Hate", 0, 4),
        seed=5,
        tokens_to_generate=8,
    )
    halves = [
        frame[frame["is_modified"] == modified].drop(columns="is_modified").reset_index(drop=True)
        for modified in (False, True)
    ]
    pd.testing.assert_frame_equal(*halves)
    assert frame.index.is_unique and frame["completions"].nunique() > 1
    assert (
        len(gen_normal_and_modified(model, tokenizer, [PROMPT] * 3, seed=5, tokens_to_generate=2))
        == 3
    )


def test_any_steering_can_be_compared(model, tokenizer):
    noise = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({3: noise})
    steered = complete(
        model,
        tokenizer,
        [PROMPT],
        vector.apply(model, multiplier=2.0),
        seed=0,
        sampling=Sampling(max_new_tokens=8),
    )
    assert steered["is_modified"].all() and steered["loss"][0] != steered["unsteered_loss"][0]


# --- the table that people read ---


def test_print_n_comparisons(model, tokenizer, additions, capsys):
    before = snapshot(model)
    print_n_comparisons(
        "I hate you because", model, tokenizer, additions, 3, 8, seed=0, top_p=0.3, freq_penalty=1.0
    )
    assert_pristine(model, before)
    text = capsys.readouterr().out
    assert "Unsteered completions" in text and "Steered completions" in text
    assert len(re.findall("I hate you because", text)) == 6
    print_n_comparisons(
        "I hate you because", model, tokenizer, num_comparisons=2, tokens_to_generate=8, seed=0
    )
    text = capsys.readouterr().out
    assert (
        "Unsteered completions" in text
        and " Steered" not in text
        and len(re.findall("I hate you because", text)) == 2
    )


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_fewer_than_one_comparison_is_refused(model, tokenizer, count):
    with pytest.raises(ValueError, match="1 or more as num_comparisons"):
        print_n_comparisons(PROMPT, model, tokenizer, num_comparisons=count)


def test_html_is_escaped_and_pairs_stay_together(monkeypatch):
    """In a notebook: a real table, prompts in bold, texts as they are."""
    shown = []
    monkeypatch.setattr(
        "common.texts.completions.Console", lambda: type("Console", (), {"is_jupyter": True})()
    )
    monkeypatch.setattr("IPython.display.display", lambda forms, raw: shown.append(forms))
    frame = pd.DataFrame(
        {
            "prompts": ["<p>", "q", "<p>", "q"],
            "completions": [" a&b", " c\nd", " e", " f"],
            "is_modified": [False, False, True, True],
        }
    )
    pretty_print_completions(frame)
    rows = re.findall("<tr>(.*?)</tr>", shown[0]["text/html"])
    assert len(rows) == 3
    assert [re.findall("<td[^>]*>(.*?)</td>", row) for row in rows[1:]] == [
        ["<b>&lt;p&gt;</b> a&amp;b", "<b>&lt;p&gt;</b> e"],
        ["<b>q</b> c<br>d", "<b>q</b> f"],
    ]
    assert shown[0]["text/plain"].splitlines() == [
        *("Unsteered completions, 1", "  <p> a&b", "Steered completions, 1", "  <p> e"),
        *("Unsteered completions, 2", "  q c", "  d", "Steered completions, 2", "  q f"),
    ]


@pytest.mark.parametrize("kinds", [[], [True, True, False]])
def test_unequal_halves_are_refused(kinds):
    frame = pd.DataFrame(
        {"prompts": ["p"] * len(kinds), "completions": ["c"] * len(kinds), "is_modified": kinds}
    )
    with pytest.raises(ValueError, match="as many steered completions as unsteered"):
        side_by_side(frame)
    with pytest.raises(ValueError, match="is_modified is missing"):
        side_by_side(frame.drop(columns="is_modified"))


def test_sampling_by_default_and_in_its_order():
    """Repetition penalty, temperature, frequency penalty; the noise of the seed comes last."""
    assert Sampling() == Sampling(20, 1.0, 1.0, 0.0, 1.0)
    ids, scores = torch.tensor([[1, 1, 2]]), torch.tensor([[4.0, 2.0, -3.0, 1.0]])
    mask = torch.ones_like(ids)

    def drawn(sampling: Sampling, given: torch.Tensor) -> torch.Tensor:
        for processor in sampling.processors(mask, [7]):
            given = processor(ids, given)
        return given

    found = drawn(Sampling(temperature=0.5, freq_penalty=3.0, repetition_penalty=2.0), scores)
    expected = torch.tensor([[8.0, 2.0 - 6.0, -12.0 - 3.0, 2.0]])
    noise = drawn(Sampling(), torch.zeros(1, 4))
    torch.testing.assert_close(found, expected + noise)


def test_top_p_keeps_the_token_that_reaches_it():
    """What is kept has at least the probability `top_p`, and without its least token less."""
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (0.97, 4)):
        given = scores
        for processor in Sampling(top_p=top_p).processors(torch.ones(1, 1), [7]):
            given = processor(torch.tensor([[0]]), given)
        assert torch.isfinite(given).tolist() == [[place < kept for place in range(4)]]
