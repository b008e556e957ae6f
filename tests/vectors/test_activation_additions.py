"""Activation additions: what is added where, and the laws of X-vectors."""

import copy
from contextlib import nullcontext

import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support import KNOWN_WORDS

from common import ActivationAddition, apply_activation_additions, get_x_vector, line_up
from common.checking.pristine import assert_pristine, snapshot
from common.loading import copy_sharing_weights
from common.places.positions import position_ids
from common.places.sites import Site, parse_site
from common.vectors.activation_additions import adding_spans, addition_vectors, read_sites, with_bos
from common.vectors.reading import record_activations
from common.vectors.steering_vector import SteeringVector

PROMPT = "I hate you because"
WEDDINGS = ("I talk about weddings constantly", "I do not talk about weddings constantly")
LOCATIONS = ("front", "mid", "back")
words = st.lists(st.sampled_from(KNOWN_WORDS), min_size=1, max_size=5).map(" ".join)


@pytest.fixture(scope="module")
def space(tokenizer) -> int:
    return tokenizer(" ")["input_ids"][0]


@pytest.fixture(scope="module")
def x_vector(tokenizer, space):
    """The wedding vector at a middle layer, as strong as it is used."""
    return get_x_vector(
        *WEDDINGS, 2, 3, tokenizer=tokenizer, pad_method="tokens_right", custom_pad_id=space
    )


def padded(tokenizer, prompts: list[str]) -> dict:
    """A left-padded batch of prompts with BOS."""
    return tokenizer(
        [tokenizer.bos_token + prompt for prompt in prompts], return_tensors="pt", padding=True
    )


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs, position_ids=position_ids(inputs["attention_mask"])).logits


def logits(model, tokenizer, prompt: str) -> torch.Tensor:
    return logits_of(model, padded(tokenizer, [prompt]))


# --- the addition itself ---


def test_a_number_is_what_the_block_reads():
    assert ActivationAddition(5, 6, "Love").act_name == "blocks.6.hook_resid_pre"
    assert ActivationAddition(5, 6, "Love") == ActivationAddition(
        5.0, "blocks.6.hook_resid_pre", prompt="Love"
    )
    assert ActivationAddition(5, (6, "decoder_block"), "Love") == ActivationAddition(
        5, "blocks.6.hook_resid_post", "Love"
    )
    assert (
        len(
            {
                ActivationAddition(5, 6, tokens=[0, 3]),
                ActivationAddition(5, 6, tokens=torch.tensor([0, 3])),
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    "other",
    [(4, 6, "Love", None), (5, 7, "Love", None), (5, 6, "Hate", None), (5, 6, None, [0, 1])],
)
def test_another_addition_is_not_equal(other):
    assert ActivationAddition(5, 6, "Love") != ActivationAddition(*other)


@pytest.mark.parametrize(
    "addition",
    [ActivationAddition(-2.5, (3, "mlp"), "Love"), ActivationAddition(5, 6, tokens=[0, 3])],
)
def test_repr_makes_it_again(addition):
    assert eval(repr(addition)) == addition


@pytest.mark.parametrize(
    "given, says",
    [
        ({}, "exactly one"),
        ({"prompt": "Love", "tokens": [1]}, "exactly one"),
        ({"prompt": 3}, "text"),
        ({"tokens": [[0, 1]]}, r"shape \[1, 2\]"),
        ({"tokens": []}, r"\[0\]"),
        ({"tokens": [0.5]}, "float"),
        ({"tokens": [-1]}, "from 0 on"),
        ({"prompt": "Love", "act_name": "blocks.6.hook_q"}, "unknown site"),
        ({"prompt": "Love", "act_name": "transformer.h.6"}, "unknown site"),
        ({"prompt": "Love", "act_name": -1}, "unknown site"),
        ({"prompt": "Love", "act_name": True}, "unknown site"),
        ({"prompt": "Love", "act_name": (6, "resid")}, "unknown site"),
        ({"prompt": "Love", "coeff": float("nan")}, "finite"),
        ({"prompt": "Love", "coeff": "5"}, "finite"),
    ],
)
def test_wrong_additions_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        ActivationAddition(**{"coeff": 5, "act_name": 6, **given})


def test_names_of_places_and_back():
    for name in (
        "blocks.0.hook_resid_pre",
        "blocks.11.hook_resid_post",
        "blocks.3.hook_mlp_out",
        "blocks.3.hook_attn_out",
    ):
        assert str(parse_site(name)) == name
    assert parse_site((2, "input_layernorm")) == Site(2, "input_layernorm")


# --- get_x_vector ---


def test_padding_makes_the_lengths_equal(tokenizer, space):
    short, long = (with_bos(tokenizer, text) for text in WEDDINGS)
    missing = [space] * (len(long) - len(short))
    right = get_x_vector(
        *WEDDINGS, 4, 3, tokenizer=tokenizer, pad_method="tokens_right", custom_pad_id=space
    )
    left = get_x_vector(
        *WEDDINGS, 4, 3, tokenizer=tokenizer, pad_method="tokens_left", custom_pad_id=space
    )
    assert [a.coeff for a in right] == [4, -4]
    assert [a.tokens.tolist() for a in right] == [short + missing, long]
    assert [a.tokens.tolist() for a in left] == [[short[0], *missing, *short[1:]], long]


def test_pad_id_0_is_an_id(tokenizer):
    """The original took the tokenizer's pad token instead."""
    other = copy.deepcopy(tokenizer)
    other.pad_token_id = 7
    assert (
        get_x_vector(*WEDDINGS, 4, 3, tokenizer=other, pad_method="tokens_right", custom_pad_id=0)[
            0
        ].tokens[-1]
        == 0
    )
    assert (
        get_x_vector(*WEDDINGS, 4, 3, tokenizer=other, pad_method="tokens_right")[0].tokens[-1] == 7
    )


def test_a_model_with_a_tokenizer_is_enough(tokenizer):
    class Holder:
        pass

    holder = Holder()
    holder.tokenizer = tokenizer
    assert get_x_vector(*WEDDINGS, 4, 3, holder, pad_method="tokens_right") == get_x_vector(
        *WEDDINGS, 4, 3, tokenizer=tokenizer, pad_method="tokens_right"
    )
    assert get_x_vector("Love", "Hate", 5, 6) == (
        ActivationAddition(5, 6, "Love"),
        ActivationAddition(-5, 6, "Hate"),
    )


@pytest.mark.parametrize(
    "given, says",
    [
        ({"pad_method": "right"}, "tokens_right"),
        ({"pad_method": "tokens_right", "custom_pad_id": 10**6}, "token id"),
        ({"pad_method": "tokens_right", "custom_pad_id": True}, "token id"),
    ],
)
def test_wrong_padding_is_refused(tokenizer, given, says):
    with pytest.raises(ValueError, match=says):
        get_x_vector("Love", "Hate", 5, 6, tokenizer=tokenizer, **given)


def test_padding_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        get_x_vector("Love", "Hate", 5, 6, pad_method="tokens_left")


# --- where it is added ---


@pytest.mark.parametrize(
    "length, count, location, expected",
    [
        (10, 4, "front", "3333111111"),
        (10, 4, "back", "1111113333"),
        (10, 4, "mid", "1113333111"),
        (9, 4, "mid", "113333111"),
        (10, 3, "mid", "1111333111"),
        (1, 1, "front", "3"),
        (4, 4, "back", "3333"),
    ],
)
def test_ones_and_twos(model, length, count, location, expected):
    """A prompt of ones and an addition of twos, at a place where the model is made to hold ones."""
    ids = torch.full((2, length), 5)
    site, seen = Site(2, "resid_post"), []
    block = model.transformer.h[2]
    ones = block.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    try:
        twos = torch.full((count, model.config.hidden_size), 2.0)
        with adding_spans(model, {(site, count): twos}, location):
            # Ours runs before hooks of others, so that the ones have to come from the block itself.
            block._forward_hooks.move_to_end(ones.id, last=False)
            look = block.register_forward_hook(lambda module, args, output: seen.append(output))
            model(ids)
            look.remove()
    finally:
        ones.remove()
    for row in seen[0]:
        assert torch.equal(row, row[:, :1].expand_as(row))
        assert "".join(str(int(value)) for value in row[:, 0]) == expected


@pytest.mark.parametrize(
    "act_name", [0, 3, "blocks.5.hook_resid_post", (2, "mlp"), (2, "self_attn")]
)
def test_steered_is_unsteered_plus_vector(model, tokenizer, act_name):
    """At the place itself, at the front, in every row of a padded batch, and nowhere else."""
    addition = ActivationAddition(2.5, act_name, "I love the garden")
    inputs = padded(tokenizer, ["I think that they are", "My old neighbour is in the garden and"])
    (((_, count), vectors),) = addition_vectors(model, tokenizer, [addition]).items()
    layer, part = (
        max(addition.site.layer - (addition.site.part == "resid_pre"), 0),
        addition.site.part,
    )
    kind = "decoder_block" if part.startswith("resid") else part

    def read() -> torch.Tensor:
        seen = []
        if act_name == 0:
            handle = model.transformer.h[0].register_forward_pre_hook(
                lambda module, args: seen.append(args[0])
            )
            logits_of(model, inputs)
            handle.remove()
            return seen[0]
        with record_activations(model, kind, layer_nums=[layer]) as records:
            logits_of(model, inputs)
        return records[layer][0]

    before = read()
    with apply_activation_additions(model, tokenizer, [addition]):
        after = read()
    for row, mask in enumerate(inputs["attention_mask"]):
        first = int((mask == 0).sum())
        moved = after[row] - before[row]
        assert torch.allclose(moved[first : first + count], vectors, atol=1e-5)
        rest = torch.cat([moved[:first], moved[first + count :]])
        assert torch.equal(rest, torch.zeros_like(rest))


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_of_a_padded_batch_is_what_it_is_alone(
    model, tokenizer, x_vector, location, use_cache
):
    """Texts, and the logits of every step, with and without a cache."""
    prompts = [
        "I went up to my friend and said",
        "My mother went to the old library on Monday and said",
        "They are on the old bridge behind the mill",
    ]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with apply_activation_additions(model, tokenizer, x_vector, location):
        together = model.generate(**padded(tokenizer, prompts), use_cache=use_cache, **options)
        for row, prompt in enumerate(prompts):
            alone = model.generate(**padded(tokenizer, [prompt]), use_cache=True, **options)
            assert torch.equal(alone.sequences[0, -8:], together.sequences[row, -8:])
            for one, many in zip(alone.logits, together.logits):
                assert torch.allclose(one[0], many[row], atol=2e-4)


@pytest.mark.parametrize("location", LOCATIONS)
def test_what_is_generated_is_not_touched(model, tokenizer, location):
    """A decoding step gets nothing; in a pass over the whole text only the prompt does."""
    addition = ActivationAddition(3, 3, "I love")
    inputs = padded(tokenizer, ["My old neighbour is in the garden"])
    with (
        apply_activation_additions(model, tokenizer, [addition], location),
        record_activations(model, layer_nums=[2]) as records,
    ):
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    steered = torch.cat(records[2], dim=1)
    with record_activations(model, layer_nums=[2]) as records:
        model(ids[:, :-1])
    moved = (steered - records[2][0])[0].norm(dim=-1) > 1e-3
    length, count = inputs["input_ids"].shape[1], 3
    start = {"front": 0, "back": length - count, "mid": length // 2 - count // 2}[location]
    # BOS moves as well: this is not an X-vector
    assert moved.nonzero().flatten().tolist() == list(range(start, start + count))


def test_a_prompt_of_one_token_is_a_prompt(model, tokenizer):
    ids = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        before = model(ids).logits
        with apply_activation_additions(model, tokenizer, [ActivationAddition(3, 3, tokens=[5])]):
            assert not torch.allclose(model(ids).logits, before, atol=0.1)


def test_passes_by_hand_that_grow_by_one_token_are_prompts_of_their_own(model, tokenizer):
    """Only generation without a cache repeats its prompt."""
    addition = [ActivationAddition(3, 3, tokens=[5])]
    ids = torch.tensor([with_bos(tokenizer, "I think that they are charming")])
    with torch.no_grad(), apply_activation_additions(model, tokenizer, addition, "back"):
        one_after_the_other = [model(ids[:, :length]).logits[0, -1] for length in (5, 6)]
    with torch.no_grad(), apply_activation_additions(model, tokenizer, addition, "back"):
        assert torch.equal(model(ids[:, :6]).logits[0, -1], one_after_the_other[1])


def test_a_text_in_two_passes_is_one_text(model, tokenizer, x_vector):
    """The prompt first, then a completion with the cache: the addition stays with the prompt."""
    prompt = padded(tokenizer, ["I went up to my friend and said"])["input_ids"]
    rest = tokenizer(" that the captain sailed", return_tensors="pt")["input_ids"]
    with torch.no_grad(), apply_activation_additions(model, tokenizer, x_vector):
        first = model(prompt, use_cache=True)
        second = model(rest, past_key_values=first.past_key_values)
        whole = model(torch.cat([prompt, rest], dim=1))
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole.logits, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT-NeoX", "Llama", "Gemma", "BLOOM", "OPT"])
def test_other_architectures(name, tokenizer):
    other = tiny_model(name, len(tokenizer))
    inputs = padded(tokenizer, ["I went up", "My mother went to the old library"])
    for act_name in (0, 2):
        additions = get_x_vector("Love", "Hate", 4, act_name)
        with record_activations(other, layer_nums=[max(act_name - 1, 0)]) as records:
            other(**inputs)
            with apply_activation_additions(other, tokenizer, additions):
                other(**inputs)
        before, *_, after = records[max(act_name - 1, 0)]  # between them the addition was read
        moved = [
            (after - before)[row].norm(dim=-1)[mask.bool()] > 1e-4
            for row, mask in enumerate(inputs["attention_mask"])
        ]
        if act_name:
            assert all(row.nonzero().flatten().tolist() == [1] for row in moved)
        else:
            assert all(
                row[1] for row in moved
            )  # from the block's input on, all later positions may move


def test_hidden_states_show_it(model, tokenizer):
    for layer in (0, 3):
        additions = get_x_vector("Love", "Hate", 4, layer)
        inputs = padded(tokenizer, [PROMPT])
        with torch.no_grad():
            before = model(**inputs, output_hidden_states=True).hidden_states[layer]
            with apply_activation_additions(model, tokenizer, additions):
                after = model(**inputs, output_hidden_states=True).hidden_states[layer]
        (((_, count), vectors),) = addition_vectors(model, tokenizer, additions).items()
        assert torch.allclose((after - before)[0, :count], vectors, atol=1e-5) and not torch.equal(
            after, before
        )


# --- laws ---


@given(first=words, layer=st.integers(0, 5))
def test_coefficient_0_is_nothing(model, tokenizer, first, layer):
    prompt = "I think that the old garden behind the mill is"
    with apply_activation_additions(model, tokenizer, get_x_vector(first, "Hate", 0, layer)):
        assert torch.equal(
            logits(model, tokenizer, prompt), logits(copy_sharing_weights(model), tokenizer, prompt)
        )


@given(text=words, coeff=st.floats(-20, 20), layer=st.integers(0, 5))
def test_the_same_prompt_twice_is_nothing(model, tokenizer, text, coeff, layer):
    prompt = "I think that the old garden behind the mill is"
    before = logits(model, tokenizer, prompt)
    with apply_activation_additions(model, tokenizer, get_x_vector(text, text, coeff, layer)):
        assert torch.equal(logits(model, tokenizer, prompt), before)


@given(first=words, second=words, coeff=st.floats(-8, 8), layer=st.integers(0, 5))
def test_turned_round_with_the_opposite_sign_is_the_same(
    model, tokenizer, first, second, coeff, layer
):
    prompt, pad = (
        "I think that the old garden behind the mill is",
        {"tokenizer": tokenizer, "pad_method": "tokens_right"},
    )
    with apply_activation_additions(
        model, tokenizer, get_x_vector(first, second, coeff, layer, **pad)
    ):
        one = logits(model, tokenizer, prompt)
    with apply_activation_additions(
        model, tokenizer, get_x_vector(second, first, -coeff, layer, **pad)
    ):
        assert torch.equal(logits(model, tokenizer, prompt), one)


@given(order=st.permutations(range(4)), location=st.sampled_from(LOCATIONS))
def test_additions_commute(model, tokenizer, order, location):
    additions = [
        ActivationAddition(2, 3, "Love"),
        ActivationAddition(-2, 3, "I hate the garden"),
        ActivationAddition(1, 1, "the old mill"),
        ActivationAddition(1.5, 3, "Hate"),
    ]
    prompt = "I think that the old garden is"
    with apply_activation_additions(model, tokenizer, additions, location):
        one = logits(model, tokenizer, prompt)
    with apply_activation_additions(model, tokenizer, [additions[i] for i in order], location):
        assert torch.equal(logits(model, tokenizer, prompt), one)


def test_the_order_of_the_rows_does_not_matter_to_the_last_bit(model):
    """Sets have an order of their own, and the last bits depend on the place in a batch."""
    generator, site = torch.Generator().manual_seed(0), Site(1, "resid_pre")
    for _ in range(20):
        one, other = (
            tuple(row) for row in torch.randint(2000, (2, 5), generator=generator).tolist()
        )
        found = [read_sites(model, rows, [site]) for rows in ([one, other], [other, one])]
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("first, second", [(1, 3), (3, 1), (3, 3)])
def test_nested_blocks_add_up(model, tokenizer, first, second):
    """Also where the inner one is read after the outer's place, and beside a steering vector."""
    outer, inner = (
        get_x_vector("Love", "Hate", 2, first),
        get_x_vector("I love", "I hate", 2, second),
    )
    noise = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({1: noise})
    with vector.apply(model), apply_activation_additions(model, tokenizer, [*outer, *inner]):
        together = logits(model, tokenizer, PROMPT)
    with (
        apply_activation_additions(model, tokenizer, outer),
        vector.apply(model),
        apply_activation_additions(model, tokenizer, inner),
    ):
        assert torch.allclose(logits(model, tokenizer, PROMPT), together, atol=1e-4)
    assert not torch.allclose(logits(model, tokenizer, PROMPT), together, atol=0.1)


def test_bos_of_an_x_vector_is_0(model, tokenizer, x_vector):
    for pad_method in ("tokens_right", "tokens_left"):
        pair = get_x_vector(*WEDDINGS, 4, 3, tokenizer=tokenizer, pad_method=pad_method)
        (vectors,) = addition_vectors(model, tokenizer, pair).values()
        assert not vectors[0].any() and (vectors[1:].norm(dim=-1) > 0).any()


def test_a_slice_of_the_stream_and_the_rest_are_the_whole(model, tokenizer, x_vector):
    site, prompt = 2, "I went up to my friend and said"

    def hidden(*slices: slice) -> torch.Tensor:
        steering = [
            apply_activation_additions(model, tokenizer, x_vector, res_stream_slice=part)
            for part in slices
        ]
        found = []
        for context in steering or [nullcontext()]:
            with context, record_activations(model, layer_nums=[site]) as records:
                logits_of(model, padded(tokenizer, [prompt]))
            found.append(records[site][0][0])
        return torch.stack(found)

    before, (whole, part, rest) = hidden()[0], hidden(slice(None), slice(0, 40), slice(40, None))
    assert torch.equal(part[:, 40:], before[:, 40:]) and torch.equal(rest[:, :40], before[:, :40])
    assert torch.allclose(part + rest - before, whole, atol=1e-5) and not torch.equal(part, before)


def test_folding_and_centring_change_no_probability(model, tokenizer, x_vector):
    """In TransformerLens' compatibility mode ITS activations differ, and give OUR probabilities."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=copy.deepcopy(model), tokenizer=tokenizer
    )
    bridge.enable_compatibility_mode()
    name = x_vector[0].act_name
    difference = sum(
        a.coeff * bridge.run_with_cache(a.tokens[None], names_filter=name)[1][name]
        for a in x_vector
    )
    (ours,) = addition_vectors(model, tokenizer, x_vector).values()
    assert not torch.allclose(difference[0], ours, atol=1e-2)
    prompt = padded(tokenizer, ["I went up to my friend and said"])["input_ids"]

    def add(hidden, hook):
        return torch.cat(
            [hidden[:, : difference.shape[1]] + difference, hidden[:, difference.shape[1] :]], dim=1
        )

    with torch.no_grad():
        theirs = bridge.run_with_hooks(prompt, fwd_hooks=[(name, add)]).log_softmax(-1)
        with apply_activation_additions(model, tokenizer, x_vector):
            mine = model(prompt).logits.log_softmax(-1)
    assert torch.allclose(theirs, mine, atol=2e-4)


# --- errors, and the model afterwards ---


def test_a_prompt_shorter_than_the_addition_is_named(model, tokenizer, x_vector):
    before = snapshot(model)
    for location in LOCATIONS:
        with (
            pytest.raises(ValueError, match="the addition has 8 tokens and a prompt only 4"),
            apply_activation_additions(model, tokenizer, x_vector, location),
        ):
            logits_of(model, padded(tokenizer, ["I went to my friend and said it", "I am here"]))
        assert_pristine(model, before)


@pytest.mark.parametrize(
    "additions, given, says",
    [
        ([ActivationAddition(1, 6, "Love")], {}, "blocks 0 to 5"),
        ([ActivationAddition(1, 3, tokens=[10**6])], {}, "does not exist"),
        ([ActivationAddition(1, 3, "Love")], {"addition_location": "end"}, "addition_location"),
        (
            [ActivationAddition(1, 3, "Love")],
            {"res_stream_slice": slice(1000, 1100)},
            "leaves none",
        ),
        ([ActivationAddition(1, 3, "Love")], {"res_stream_slice": 3}, "expected a slice"),
        (["Love"], {}, "expected ActivationAdditions"),
    ],
)
def test_mistakes_are_named_before_anything_is_changed(model, tokenizer, additions, given, says):
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match=says),
        apply_activation_additions(model, tokenizer, additions, **given),
    ):
        pass
    assert_pristine(model, before)


def test_restored_after_an_exception_inside(model, tokenizer, x_vector):
    before = snapshot(model)
    with pytest.raises(KeyError), apply_activation_additions(model, tokenizer, x_vector):
        raise KeyError
    assert_pristine(model, before)


def test_reading_leaves_the_mode_and_ignores_dropout(model, tokenizer):
    """A model in training mode gives the same activations, and stays in training mode."""
    other = copy_sharing_weights(model).train()
    key = (0, 9, 11), Site(3, "resid_pre")
    assert torch.equal(
        read_sites(other, [key[0]], [key[1]])[key], read_sites(model, [key[0]], [key[1]])[key]
    )
    assert all(module.training for module in other.modules())


# --- where the tokens line up ---


def test_line_up(model, tokenizer, x_vector):
    frame = line_up(model, tokenizer, "I went up to my friend and said", x_vector)
    assert list(frame.columns) == ["prompt", "+2", "-2", "steering", "residual", "ratio"]
    assert "".join(frame["prompt"]) == tokenizer.bos_token + "I went up to my friend and said"
    assert "".join(frame["-2"]) == tokenizer.bos_token + WEDDINGS[1]
    (vectors,) = addition_vectors(model, tokenizer, x_vector).values()
    assert (
        torch.allclose(torch.tensor(frame["steering"])[:8].float(), vectors.norm(dim=-1))
        and frame["steering"][8] == 0
    )
    assert (frame["ratio"] == frame["steering"] / frame["residual"]).all() and frame[
        "residual"
    ].min() > 1
    back = line_up(model, tokenizer, "I went up to my friend and said", x_vector, "back")
    assert back["-2"][0] == "" and back["-2"][1] == tokenizer.bos_token
    with pytest.raises(ValueError, match="one place"):
        line_up(
            model,
            tokenizer,
            "I went up",
            [ActivationAddition(1, 3, "Love"), ActivationAddition(1, 4, "Hate")],
        )
