"""A coefficient for each row, a vector for each row: what each would get alone."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, ODD, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support import a_vector, texts_of
from torch import nn

from common import (
    SteeringVector,
    ablation_operator,
    cap_operator,
    norm_preserving_addition_operator,
    rotation_operator,
    steer_rows,
)
from common.checking.pristine import assert_pristine, snapshot
from common.passes.padding import encode
from common.places.positions import with_position_ids
from common.texts.generation import logits

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the", "You are"]


SECOND = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(9))
SETTINGS = {
    "addition": {},
    "from 1 on": {"min_token_index": 1},
    "ablation": {"operator": ablation_operator()},
    "norm": {"operator": norm_preserving_addition_operator()},
    "cap": {"operator": cap_operator(0.2)},
    "rotation": {"operator": rotation_operator(120, SECOND)},
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_each_row_has_its_own_coefficient(tokenizer, name):
    """Text and logits are those of a call for the row alone; with 0 those of no steering."""
    model = tiny_model(name, len(tokenizer))
    before, vector, each = snapshot(model), a_vector(D_MODEL, [0, LAYERS - 2]), [0, 3, -1.5, 0.5]
    inputs, plain = (
        encode(tokenizer, PROMPTS, None),
        logits(model, encode(tokenizer, PROMPTS, None)),
    )
    with vector.apply(model, multiplier=each):
        found, texts = logits(model, inputs), texts_of(model, tokenizer, PROMPTS)
        if name != "RWKV":  # it does not generate without its state
            assert texts_of(model, tokenizer, PROMPTS, use_cache=False) == texts
    assert torch.equal(found[0], plain[0]) and not torch.allclose(found[1], plain[1], atol=1e-2)
    for factor, prompt, text in zip(each, PROMPTS, texts):
        with vector.apply(model, multiplier=factor):
            assert texts_of(model, tokenizer, [prompt]) == [text]
    assert_pristine(model, before)


@pytest.mark.parametrize("name", SETTINGS)
def test_coefficients_go_with_every_setting(tokenizer, name):
    """The same in all rows is one for all; a row with 0 stays, whatever the operator."""
    model = tiny_model("GPT-2", len(tokenizer))
    vector, inputs = a_vector(D_MODEL, [1]), encode(tokenizer, PROMPTS, None)
    plain, settings = logits(model, inputs), SETTINGS[name]
    real = inputs["attention_mask"].bool()
    with vector.apply(model, multiplier=2.0, **settings):
        every = logits(model, inputs)
    with vector.apply(model, multiplier=torch.full((4,), 2.0), **settings):
        torch.testing.assert_close(logits(model, inputs)[real], every[real])
    with vector.apply(model, multiplier=(2, 0, 2, 0), **settings):
        found = logits(model, inputs)
    for row in (1, 3):
        assert torch.equal(found[row], plain[row])
    for row in (0, 2):
        torch.testing.assert_close(found[row][real[row]], every[row][real[row]])
        assert not torch.allclose(found[row], plain[row], atol=1e-2)


def test_padding_is_not_steered(model, tokenizer):
    inputs = encode(tokenizer, PROMPTS, None)
    padding = ~inputs["attention_mask"].bool()
    vector, seen = a_vector(model.config.hidden_size, [2]), []
    hook = lambda module, args, output: seen.append(output)  # noqa: E731
    handle = model.transformer.h[2].register_forward_hook(hook)
    try:
        model(**with_position_ids(inputs))
        with vector.apply(model, multiplier=[1.0, 2.0, 3.0, 4.0]):
            model(**with_position_ids(inputs))
    finally:
        handle.remove()
    moved = (seen[1] - seen[0]).norm(dim=-1)
    assert not moved[padding].any()
    lengths = vector.norm()[2] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    for row, length, kept in zip(moved, lengths, ~padding):
        torch.testing.assert_close(row[kept], length.expand(int(kept.sum())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}])
def test_rows_of_one_prompt_have_its_coefficient(model, tokenizer, options):
    vector, each = a_vector(model.config.hidden_size, [2], size=3.0), [0.0, 1.0, -1.0, 2.0]
    with vector.apply(model, multiplier=each):
        found = texts_of(model, tokenizer, PROMPTS, **options)
    assert len(found) == 8
    for number, (factor, prompt) in enumerate(zip(each, PROMPTS)):
        with vector.apply(model, multiplier=factor):
            expected = texts_of(model, tokenizer, [prompt], **options)
        assert found[2 * number : 2 * number + 2] == expected


def test_rows_are_not_shared_out_by_guess(model, tokenizer):
    """Fewer than prompts are refused; so are those of beams, which change places."""
    vector, each = a_vector(model.config.hidden_size, [2], size=3.0), [0.0, 3.0]
    inputs = encode(tokenizer, PROMPTS, None)
    sampled = {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
    beams = {"num_return_sequences": 2, "num_beams": 2}
    for steered in (
        vector.apply(model, multiplier=each),
        steer_rows(model, [None, vector]),
        vector.apply(model, token_indices=torch.tensor([[0, 1], [1, 0]])),
    ):
        with steered:
            for call in (
                lambda: logits(model, inputs),
                lambda: texts_of(model, tokenizer, PROMPTS),
                lambda: texts_of(model, tokenizer, PROMPTS, **sampled),
                lambda: texts_of(model, tokenizer, PROMPTS[:1], **beams),
            ):
                with pytest.raises(ValueError, match="has 2 rows and the batch has"):
                    call()
            assert len(texts_of(model, tokenizer, PROMPTS[:2], **beams)) == 4
    with vector.apply(model, multiplier=each):
        found = texts_of(model, tokenizer, PROMPTS[:1], **sampled)
    for text, x in zip(found, each, strict=True):
        with vector.apply(model, multiplier=x):
            assert texts_of(model, tokenizer, PROMPTS[:1]) == [text]


def test_a_vector_in_16_bit_is_multiplied_before_it_is_rounded(model, tokenizer):
    """As with one multiplier."""
    vector = a_vector(model.config.hidden_size, [2]).to(torch.bfloat16)
    inputs = encode(tokenizer, PROMPTS[:1], None)
    with vector.apply(model, multiplier=0.3):
        expected = logits(model, inputs)
    with vector.apply(model, multiplier=[0.3]):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-6, atol=1e-5)


def test_a_vector_is_learned_through_its_rows(model, tokenizer):
    """The gradient is the sum of the rows', each times its coefficient."""
    inputs = with_position_ids(encode(tokenizer, PROMPTS[:1] * 2, None))
    learned = nn.Parameter(a_vector(model.config.hidden_size, [5]).layer_activations[5])
    gradients = []
    for each in ([2.0, 0.0], [0.0, 1.0], [2.0, 1.0]):
        with SteeringVector({5: learned}).apply(model, multiplier=each):
            for _ in range(2):  # a graph of its own in each pass
                model(**inputs).logits.sum().backward()
        gradients.append(learned.grad)
        learned.grad = None
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-3, atol=1e-2)


# --- a vector for each row ---


@given(
    st.lists(st.sampled_from(["none", "one", "other", "both"]), min_size=1, max_size=4),
    st.lists(st.sampled_from([0.0, 1.0, -2.0]), min_size=4, max_size=4),
)
def test_each_row_has_its_own_vector(model, tokenizer, names, factors):
    width = model.config.hidden_size
    vectors = {
        "none": None,
        "one": a_vector(width, [2], 1),
        "other": a_vector(width, [4], 2),
        "both": a_vector(width, [1, 4], 3),
    }
    prompts, factors = PROMPTS[: len(names)], factors[: len(names)]
    inputs = encode(tokenizer, prompts, None)
    plain = logits(model, inputs)
    with steer_rows(model, [vectors[name] for name in names], factors):
        found = logits(model, inputs)
    for number, (name, factor) in enumerate(zip(names, factors)):
        if name == "none" or not factor:
            assert torch.equal(found[number], plain[number])
            continue
        with vectors[name].apply(model, multiplier=factor):
            alone = logits(model, encode(tokenizer, [prompts[number]], None))[0]
        last = found[number, -len(alone) :]
        assert torch.allclose(last, alone, atol=1e-3) and not torch.equal(last, plain[number])


def test_texts_of_rows_are_those_of_single_calls(model, tokenizer):
    before, width = snapshot(model), model.config.hidden_size
    rows = [a_vector(width, [2], 1, 2.0), None, a_vector(width, [0, 5], 2), a_vector(width, [2], 3)]
    settings = {"operator": norm_preserving_addition_operator()}
    with steer_rows(model, rows, 1.5, **settings):
        found = texts_of(model, tokenizer, PROMPTS)
    for row, prompt, text in zip(rows, PROMPTS, found):
        with (row or 0 * rows[0]).apply(model, multiplier=1.5, **settings):
            assert texts_of(model, tokenizer, [prompt]) == [text]
    assert_pristine(model, before)


def test_a_number_of_numpy_is_a_number(model, tokenizer):
    """Also as an array without dimensions."""
    vector, inputs = a_vector(model.config.hidden_size, [2]), encode(tokenizer, PROMPTS, None)
    with vector.apply(model, multiplier=2.0):
        expected = logits(model, inputs)
    for factor in (np.array(2.0), np.array(2), np.float32(2.0)):
        with vector.apply(model, multiplier=factor):
            assert torch.equal(logits(model, inputs), expected)


# --- what is refused ---


def test_rows_that_do_not_fit_are_refused(model, tokenizer):
    """Before anything is changed; and a batch that has another number of rows, in its pass."""
    before, vector = snapshot(model), a_vector(model.config.hidden_size, [2])
    for wrong, says in (
        ([], "a number for each row"),
        ("12", "finite number as multiplier"),
        (None, "finite number as multiplier"),
        ([1.0, "2"], "multiplier of a row"),
        ([1.0, float("nan")], "multiplier of a row"),
        (torch.ones(2, 2), "multiplier of a row"),
        ([True, False], "multiplier of a row"),
        ({0: 1.0, 3: 2.0}, "for each row, in their order, as multiplier"),
        (np.array("2"), "finite number as multiplier, got '2'"),
        ([0.0, -1e39], "after multiplication by 1e.39"),
    ):
        with pytest.raises(ValueError, match=says), vector.apply(model, multiplier=wrong):
            pass
    for rows, factors, says in (
        ([], 1.0, "a SteeringVector or None for each row"),
        (vector, 1.0, "a SteeringVector or None for each row"),
        ([vector, 3], 1.0, "a SteeringVector or None for each row"),
        ([vector, None], [1.0], "expected 2 multipliers, one for each row, got 1"),
        ([vector, a_vector(8, [2])], 1.0, "has 8 numbers"),
    ):
        with pytest.raises(ValueError, match=says), steer_rows(model, rows, factors):
            pass
    assert_pristine(model, before)
    inputs = encode(tokenizer, PROMPTS[:3], None)
    with vector.apply(model, multiplier=[1.0, 2.0]):
        with pytest.raises(ValueError, match="the multiplier has 2 rows and the batch has 3"):
            logits(model, inputs)
        with pytest.raises(ValueError, match="several texts share one row"):
            model(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
        with pytest.raises(ValueError, match="several texts share one row"):
            model.init_continuous_batching()
    assert_pristine(model, before)
