"""Conditional steering: decided for each prompt, whatever stands beside it, and kept."""

import copy
import io

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, ODD, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from common import Condition, SteeringVector, ablation_operator, steer_rows
from common.checking.pristine import assert_pristine, snapshot
from common.passes.padding import encode
from common.passes.prompts import prompt_ids
from common.places.positions import with_position_ids
from common.texts.generation import generate, logits
from common.vectors.conditions import prompt_means
from common.vectors.reading import record_activations

PROMPTS = [
    "I think dogs are",
    "My neighbour",
    "The old library is on the",
    "You are",
    "We talk about weddings constantly. The bride",
    "This year winter is",
]
NEW = 5


def a_vector(d_model: int, layers, seed: int = 1, size: float = 2.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    draws = {layer: torch.randn(d_model, generator=generator) for layer in layers}
    return SteeringVector({layer: size * draw for layer, draw in draws.items()})


def a_condition(model, tokenizer, layer: int, seed: int = 0, above: bool = True) -> Condition:
    """One that holds for about half of the prompts: the threshold lies in the widest middle gap."""
    generator = torch.Generator().manual_seed(seed)
    means = prompt_means(model, prompt_ids(tokenizer, PROMPTS, None), [layer])[layer]
    draw = torch.randn(means.shape[-1], generator=generator)
    # Otherwise what all prompts have in common decides.
    draw = draw - (draw @ means.mean(0)) / means.mean(0).square().sum() * means.mean(0)
    cosines = Condition(draw, layer, 0.0).similarity(means).sort().values
    gap = cosines.diff()[1:-1].argmax() + 1
    return Condition(draw, layer, float(cosines[gap : gap + 2].mean()), above)


def texts_of(model, tokenizer, prompts, **options) -> list[list[int]]:
    inputs = encode(tokenizer, prompts, None)
    options = {"max_new_tokens": NEW, "forced_eos_token_id": None, **options}
    ids = generate(model, inputs, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def check(model, tokenizer, vector, condition, **options) -> None:
    """The laws, for logits and for generated text."""
    before, inputs = snapshot(model), encode(tokenizer, PROMPTS, None)
    holds = condition.holds(model, tokenizer, PROMPTS)
    assert any(holds) and not all(holds)
    plain, texts = logits(model, inputs), texts_of(model, tokenizer, PROMPTS, **options)
    with vector.apply(model):
        everywhere = texts_of(model, tokenizer, PROMPTS, **options)
    with vector.apply(model, multiplier=[float(one) for one in holds]):
        meant, meant_texts = logits(model, inputs), texts_of(model, tokenizer, PROMPTS, **options)
    with vector.apply(model, condition=condition):
        found, found_texts = logits(model, inputs), texts_of(model, tokenizer, PROMPTS, **options)
        alone = [texts_of(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
        uncached = texts_of(model, tokenizer, PROMPTS, **options, use_cache=False)
    assert torch.equal(found, meant) and found_texts == meant_texts == alone == uncached
    for number, one in enumerate(holds):
        if one:
            assert found_texts[number] == everywhere[number]
            assert not torch.equal(found[number], plain[number])
        else:
            assert (
                torch.equal(found[number], plain[number]) and found_texts[number] == texts[number]
            )
    assert_pristine(model, before)


# --- who is steered ---


@pytest.mark.parametrize("layers", [(0,), (2,), (5,), (1, 4)])
def test_only_rows_that_match_are_steered(model, tokenizer, layers):
    """Where the steering acts below the layer of the condition, and above it."""
    vector = a_vector(model.config.hidden_size, layers)
    for layer, above in ((1, True), (4, False)):
        check(model, tokenizer, vector, a_condition(model, tokenizer, layer, above=above))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *(name for name in ODD if name != "RWKV")])
def test_other_architectures_are_steered_where_they_match(tokenizer, name):
    model = tiny_model(name, len(tokenizer))
    condition = a_condition(model, tokenizer, LAYERS - 2)
    check(model, tokenizer, a_vector(D_MODEL, [1, LAYERS - 1]), condition)


@given(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4))
def test_a_decision_does_not_see_the_batch(model, tokenizer, prompts):
    """Nor the padding, which may be on either side."""
    condition = a_condition(model, tokenizer, 3)
    vector = a_vector(model.config.hidden_size, [2])
    holds = dict(zip(PROMPTS, condition.holds(model, tokenizer, PROMPTS)))
    assert condition.holds(model, tokenizer, prompts) == [holds[prompt] for prompt in prompts]
    for side in ("left", "right"):
        before, tokenizer.padding_side = tokenizer.padding_side, side
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        tokenizer.padding_side = before
        plain, found = logits(model, inputs), []
        with vector.apply(model, condition=condition):
            found = model(**with_position_ids(inputs)).logits
        same = [torch.equal(one, other) for one, other in zip(found, plain)]
        real = inputs["attention_mask"].bool()
        moved = [not torch.equal(a[m], b[m]) for a, b, m in zip(found, plain, real)]
        assert moved == [holds[prompt] for prompt in prompts] and moved == [not one for one in same]


# --- kept ---


def test_a_decision_is_kept_for_all_that_is_generated(model, tokenizer, monkeypatch):
    """It is taken once a text, on its prompt alone, also of a prompt that is read in chunks."""
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [1])
    asked, decide = [], Condition.of_means

    def noting(self, means):
        asked.append(decide(self, means))
        return asked[-1]

    monkeypatch.setattr(Condition, "of_means", noting)
    with vector.apply(model, condition=condition):
        whole = texts_of(model, tokenizer, PROMPTS, max_new_tokens=8)
        assert len(asked) == 1
        in_chunks = texts_of(model, tokenizer, PROMPTS, max_new_tokens=8, prefill_chunk_size=2)
        assert whole == in_chunks and len(asked) == 2 and torch.equal(*asked)
        # A text that goes on is another prompt.
        prompt = PROMPTS[0]
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + whole[0]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
        means = prompt_means(model, ids.tolist(), [3])
        assert len(asked) == 3 and torch.equal(asked[-1], decide(condition, means))


def test_passes_by_hand_go_on_with_the_decision_of_their_cache(model, tokenizer):
    """One token after the other, two conditions at once, and a cache that begins anew."""
    one, other = (a_condition(model, tokenizer, 3, seed) for seed in (0, 5))
    assert one.holds(model, tokenizer, PROMPTS) != other.holds(model, tokenizer, PROMPTS)
    first, second = (a_vector(model.config.hidden_size, [1], seed) for seed in (1, 2))
    with first.apply(model, condition=one), second.apply(model, condition=other), torch.no_grad():
        for chosen in ([0, 1, 2], [3, 4, 5]):
            prompts = [PROMPTS[number] for number in chosen]
            inputs = encode(tokenizer, prompts, None)
            expected = texts_of(model, tokenizer, prompts)
            given, cache, written = with_position_ids(inputs), None, []
            mask = inputs["attention_mask"]
            for _ in range(NEW):
                output = model(**given, past_key_values=cache, use_cache=True)
                token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                written.append(token)
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                given = {
                    "input_ids": token,
                    "attention_mask": mask,
                    "position_ids": mask.sum(-1, keepdim=True) - 1,
                }
            assert torch.cat(written, dim=1).tolist() == expected


def test_a_cache_does_not_hold_the_model(model, tokenizer):
    """Its copy goes on with the decision, and shares nothing; what is saved has no decision."""
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [1])
    inputs, token = encode(tokenizer, PROMPTS, None), torch.full((len(PROMPTS), 1), 7)
    with vector.apply(model, condition=condition), torch.no_grad():
        cache = model(**with_position_ids(inputs), use_cache=True).past_key_values
        size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        saved = io.BytesIO()
        torch.save(cache, saved)
        assert len(saved.getvalue()) < 1.1 * size + 10_000
        seen: dict = {}
        copied = copy.deepcopy(cache, seen)
        assert not seen.keys() & {id(part) for part in (*model.modules(), *model.parameters())}
        expected = model(token, past_key_values=cache).logits
        assert torch.equal(model(token, past_key_values=copied).logits, expected)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        with pytest.raises(ValueError, match="decided on the token ids of the prompt"):
            model(token, past_key_values=loaded)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
)
def test_all_rows_of_a_prompt_follow_it(model, tokenizer, options):
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [2])
    holds = condition.holds(model, tokenizer, PROMPTS)
    plain = texts_of(model, tokenizer, PROMPTS, **options)
    with vector.apply(model):
        steered = texts_of(model, tokenizer, PROMPTS, **options)
    with vector.apply(model, condition=condition):
        found = texts_of(model, tokenizer, PROMPTS, **options)
    assert len(found) == 2 * len(PROMPTS)
    for number, text in enumerate(found):
        assert text == (steered if holds[number // 2] else plain)[number]


def test_guesses_of_prompt_lookup_change_nothing(model, tokenizer):
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [2])
    with vector.apply(model, condition=condition):
        for prompt in PROMPTS[:3]:
            expected = texts_of(model, tokenizer, [prompt])
            assert texts_of(model, tokenizer, [prompt], prompt_lookup_num_tokens=2) == expected


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_drafts_of_the_first_layers_follow_the_whole_models_decision(tokenizer, layer):
    """While they are written the model's config says that it has two blocks."""
    llama, inputs = tiny_model("Llama", len(tokenizer)), encode(tokenizer, ["I think dogs are"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    vector = a_vector(D_MODEL, [1])
    plain = llama.generate(**inputs, **options)
    (mean,) = prompt_means(llama, prompt_ids(tokenizer, ["I think dogs are"]), [layer])[layer]
    for sign in (1, -1):
        with vector.apply(llama, condition=Condition(sign * mean, layer, 0.5)):
            found = llama.generate(**inputs, **options, assistant_early_exit=2)
            assert torch.equal(found, llama.generate(**inputs, **options))
        assert torch.equal(found, plain) == (sign < 0)


@pytest.mark.parametrize("more", [{}, {"negative": True}, {"num_beams": 2}])
def test_the_text_that_guides_has_the_decision_of_its_prompt(model, tokenizer, more):
    """Whatever is in it: the last token of the prompt alone, or another prompt."""
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [2])
    inputs, holds = encode(tokenizer, PROMPTS, None), condition.holds(model, tokenizer, PROMPTS)
    others = inputs["input_ids"][:, -1:]
    if more == {"negative": True}:
        others = encode(tokenizer, PROMPTS[::-1], None)
        mask, others = others["attention_mask"], others["input_ids"]
        more = {"negative_prompt_ids": others, "negative_prompt_attention_mask": mask}
        assert condition.holds(model, tokenizer, PROMPTS[::-1]) != holds
    else:
        means = prompt_means(model, others.tolist(), [3])
        assert condition.of_means(means).tolist() != holds

    def guided() -> tuple[torch.Tensor, ...]:
        found = model.generate(
            **inputs,
            **more,
            max_new_tokens=3,
            do_sample=False,
            guidance_scale=1.5,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return found.sequences, *found.scores

    with vector.apply(model, multiplier=[float(one) for one in holds]):
        expected = guided()
    with vector.apply(model, condition=condition):
        found = guided()
    assert all(map(torch.equal, found, expected))


# --- beside other steering ---


def test_a_condition_is_read_from_the_unsteered_model(model, tokenizer):
    """Whatever else steers, outside, inside, or the same vector: the same rows are meant."""
    condition = a_condition(model, tokenizer, 4)
    vector, strong = (a_vector(model.config.hidden_size, [1], seed, 20.0) for seed in (1, 2))
    holds = condition.holds(model, tokenizer, PROMPTS)
    inputs, each = encode(tokenizer, PROMPTS, None), [float(one) for one in holds]
    with strong.apply(model):
        assert condition.holds(model, tokenizer, PROMPTS) == holds
        with vector.apply(model, multiplier=each):
            expected = logits(model, inputs)
        with vector.apply(model, condition=condition):
            assert torch.equal(logits(model, inputs), expected)
    with vector.apply(model, multiplier=each), strong.apply(model):
        expected = logits(model, inputs)
    with vector.apply(model, condition=condition), strong.apply(model):
        assert torch.equal(logits(model, inputs), expected)


def test_conditions_take_the_other_settings_along(model, tokenizer):
    """Operators, positions and multipliers hold for the rows that are meant."""
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [2])
    holds, inputs = condition.holds(model, tokenizer, PROMPTS), encode(tokenizer, PROMPTS, None)
    each = [1.0, 2.0, -1.0, 0.5, 3.0, 0.0]
    own = [factor * one for factor, one in zip(each, holds)]
    for settings in (
        {"operator": ablation_operator()},
        {"min_token_index": -1},
        {"token_indices": [0]},
    ):
        with vector.apply(model, multiplier=own, **settings):
            expected = logits(model, inputs)
        with vector.apply(model, multiplier=each, condition=condition, **settings):
            assert torch.equal(logits(model, inputs), expected)
        with steer_rows(model, [vector] * 6, each, condition=condition, **settings):
            assert torch.equal(logits(model, inputs), expected)


def test_dropout_and_gradients_do_not_reach_a_decision(model, tokenizer):
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [2])
    with (
        record_activations(model, layer_nums=[2]) as records,
        vector.apply(model, condition=condition),
    ):
        model(**encode(tokenizer, PROMPTS, None))
    assert len(records[2]) == 1, "the reading of the prompt is no pass of the model"
    small = tiny_model("GPT-2", len(tokenizer)).train()
    small.config.resid_pdrop = 0.9
    own = a_condition(small, tokenizer, 2)
    assert small.training and own.holds(small, tokenizer, PROMPTS) == own.holds(
        small.eval(), tokenizer, PROMPTS
    )


# --- rules ---


def test_rules_are_combined_row_by_row(model, tokenizer):
    one, other = (a_condition(model, tokenizer, layer, seed) for layer, seed in ((1, 0), (4, 5)))
    a, b = (rule.holds(model, tokenizer, PROMPTS) for rule in (one, other))
    assert {*zip(a, b)} > {(True, False), (False, True)}
    rules = {
        one & other: [x and y for x, y in zip(a, b)],
        one | other: [x or y for x, y in zip(a, b)],
        ~one: [not x for x in a],
        ~(one | other) | (one & other): [x == y for x, y in zip(a, b)],
    }
    vector = a_vector(model.config.hidden_size, [2])
    for rule, expected in rules.items():
        assert rule.holds(model, tokenizer, PROMPTS) == expected
        if any(expected) and not all(expected):
            check(model, tokenizer, vector, rule)
    assert repr(one & ~other) == f"({one!r} & ~{other!r})" and " | " in repr(one | other)
    with pytest.raises(TypeError):
        one & True
    for words in (lambda: one and other, lambda: one or other, lambda: not one):
        with pytest.raises(TypeError, match="combine rules with &, [|] and ~"):
            words()


def test_the_similarity_is_that_of_the_paper(model, tokenizer):
    """The cosine between h and its projection on c, |cos(h, c)|; by default with its sign."""
    condition = a_condition(model, tokenizer, 3)
    means = prompt_means(model, prompt_ids(tokenizer, PROMPTS, None), [3])[3].double()
    c = condition.vector.double()
    projected = (means @ c / (c @ c))[:, None] * c
    paper = torch.cosine_similarity(means, projected)
    absolute = Condition(condition.vector, 3, 0.0, absolute=True)
    torch.testing.assert_close(absolute.similarity(means), paper, rtol=1e-5, atol=1e-8)
    signed = condition.similarity(means)
    torch.testing.assert_close(signed.abs(), paper, rtol=1e-5, atol=1e-8)
    assert (signed < 0).any() and (signed > 0).any()
    for size in (1e-30, 1e-10, 1e30):  # float32 has no square of it
        longer = Condition(size * condition.vector, 3, 0.0)
        torch.testing.assert_close(longer.similarity(means), signed, rtol=1e-5, atol=1e-6)
    turned = Condition(-condition.vector, 3, -condition.threshold, above=not condition.above)
    assert turned.holds(model, tokenizer, PROMPTS) == condition.holds(model, tokenizer, PROMPTS)


def test_the_mean_is_over_all_tokens_of_a_prompt(model, tokenizer):
    rows = prompt_ids(tokenizer, PROMPTS, None)
    found = prompt_means(model, rows, [0, 5])
    for number, row in enumerate(rows):
        with record_activations(model, layer_nums=[0, 5]) as records, torch.no_grad():
            model(torch.tensor([row]))
        for layer in (0, 5):
            expected = records[layer][0][0].mean(0)
            torch.testing.assert_close(found[layer][number], expected, rtol=1e-5, atol=1e-5)


# --- what is refused ---


def test_what_cannot_be_decided_is_refused(model, tokenizer):
    """Before anything is changed, or in the pass that does not have the prompt."""
    condition, vector = a_condition(model, tokenizer, 3), a_vector(model.config.hidden_size, [2])
    before, inputs = snapshot(model), encode(tokenizer, PROMPTS[:2], None)
    for wrong, says in (
        (Condition(torch.ones(8), 3, 0.1), "8 numbers, and d_model"),
        (Condition(condition.vector, 6, 0.1), "layer 6 does not exist"),
        (condition & Condition(torch.ones(8), 3, 0.1), "8 numbers"),
        (lambda ids: True, "expected a Condition"),
    ):
        with pytest.raises(ValueError, match=says), vector.apply(model, condition=wrong):
            pass
    for values, says in (
        ((torch.zeros(4), 1, 0.0), "other than 0"),
        ((torch.ones(2, 4), 1, 0.0), "vector"),
        ((torch.ones(4), -1, 0.0), "layer"),
        ((torch.ones(4), 1, float("nan")), "threshold"),
        ((torch.ones(4), 1, 0.0, "smaller"), "True or False as above, got 'smaller'"),
        ((torch.ones(4), 1, 0.0, True, 1), "True or False as absolute, got 1"),
    ):
        with pytest.raises(ValueError, match=says):
            Condition(*values)
    assert repr(Condition(torch.ones(4), 1, 0.5, np.bool_(False))).startswith("Condition(cosine <")
    for rule in (condition, ~condition):
        for endless in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="block 3 hold nan or inf"):
                rule.of_means({3: torch.full((1, model.config.hidden_size), endless)})
    with pytest.raises(ValueError, match="empty"):
        condition.holds(model, tokenizer, [""], prepend_bos=False)
    entries = model.get_input_embeddings()(inputs["input_ids"])
    cache = model(**inputs, use_cache=True).past_key_values
    with vector.apply(model, condition=condition):
        for call in (
            lambda: model(inputs_embeds=entries, attention_mask=inputs["attention_mask"]),
            lambda: model.generate(
                inputs_embeds=entries, attention_mask=inputs["attention_mask"], max_new_tokens=2
            ),
            lambda: model(inputs["input_ids"][:, -1:], past_key_values=cache),
        ):
            with pytest.raises(ValueError, match="decided on the token ids of the prompt"):
                call()
        with pytest.raises(ValueError, match="several texts share one row"):
            model(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert_pristine(model, before)
