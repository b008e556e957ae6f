"""What a request may ask for, and what is refused before an engine sees it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.serving.requests import CHECKED, Menu, Offer, Steering, steering_args

MENU = Menu(
    {
        "love": Offer(layers=(2, 3), tokens=None, largest=2.0, digest="a"),
        "wedding": Offer(layers=(1,), tokens=4, largest=2.0, digest="b"),
        "small": Offer(layers=(0,), tokens=None, largest=0.5, digest="c"),
    },
    max_coeff=20.0,
    largest=30.0,
)


def test_a_request_without_arguments_is_not_steered():
    assert MENU.read(None, 5) is None
    assert MENU.read({}, 5) is None
    assert MENU.read({"session_id": "x", 1: 2}, 5) is None


def test_a_request_carries_plain_values_and_nothing_more():
    assert steering_args("love") == {"steering": "love", "steering_coeff": 1.0}
    asked = steering_args("love", 2, range(2, 4), -1)
    assert (
        json.loads(json.dumps(asked))
        == asked
        == {
            "steering": "love",
            "steering_coeff": 2,
            "steering_layers": [2, 3],
            "steering_min_token_index": -1,
        }
    )


def test_arguments_become_a_steering():
    asked = steering_args("love", -3, [3], 2)
    assert MENU.read(asked, 5) == Steering("love", -3.0, (3,), start=2)
    assert MENU.read(steering_args("love"), 5) == Steering("love", 1.0, (2, 3))
    unordered = MENU.read(steering_args("love", layers=[3, 2]), 5)
    assert unordered == Steering("love", 1.0, (2, 3)), "it shares the cache of [2, 3]"
    assert MENU.read(steering_args("wedding", 2), 5) == Steering("wedding", 2.0, (1,), end=4)


@pytest.mark.parametrize(("name", "coeff"), [("small", 20), ("small", -20), ("love", -15)])
def test_a_limit_may_be_reached(name, coeff):
    assert MENU.read(steering_args(name, coeff), 5).coeff == coeff


@pytest.mark.parametrize(("given", "start"), [(0, 0), (7, 7), (-1, 4), (-5, 0), (-9, 0)])
def test_negative_positions_count_from_the_end_of_the_prompt(given, start):
    steering = MENU.read(steering_args("love", min_token_index=given), 5)
    assert steering.start == start


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"steering": "hate"}, "unknown steering vector 'hate'.*love, small, wedding"),
        ({"steering": ["love"]}, "unknown steering vector"),
        ({"steering_coeff": 3}, "unknown steering vector None"),
        ({"steering": "love", "coeff": 3}, "expected steering_coeff beside 'steering'"),
        ({"steering": "love", "steering_coef": 3}, "unknown argument 'steering_coef'"),
        ({"steering": "love", CHECKED: {}}, f"unknown argument '{CHECKED}'"),
        (steering_args("love", math.nan), "finite number as steering_coeff, got nan"),
        (steering_args("love", -math.inf), "finite number as steering_coeff, got -inf"),
        (steering_args("love", "3"), "finite number as steering_coeff, got '3'"),
        (steering_args("love", 20.5), "between -20 and 20"),
        (steering_args("small", -20.5), "between -20 and 20"),
        (steering_args("love", -16), "outside the numbers of the model"),
        (steering_args("love", layers=[4]), "no vector for layer 4"),
        (steering_args("love", layers=[2, 2]), "expected different layers"),
        (steering_args("love", layers=[]), "expected different layers"),
        (steering_args("love", layers=[2.0]), "expected an integer of 0 or more"),
        ({**steering_args("love"), "steering_layers": 2}, "expected a list of layer numbers"),
        (steering_args("love", min_token_index=1.5), "expected an integer as"),
        (steering_args("wedding", min_token_index=1), "takes no steering_min_token_index"),
    ],
)
def test_what_is_wrong_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        MENU.read(args, 5)


def test_an_addition_needs_a_prompt_that_is_long_enough():
    assert MENU.read(steering_args("wedding"), 4)
    with pytest.raises(ValueError, match="the prompt has 3 tokens"):
        MENU.read(steering_args("wedding"), 3)


def test_an_engine_without_vectors_refuses_requests_that_ask_for_steering():
    empty = Menu({}, 0.0, 0.0)
    assert empty.read({}, 5) is None
    with pytest.raises(ValueError, match="started without steering vectors"):
        empty.read(steering_args("love"), 5)


STEERINGS = st.builds(
    Steering,
    st.sampled_from(["love", "wedding"]),
    st.sampled_from([0.0, 1.0, -1.0, 0.1]),
    st.sampled_from([(2,), (3,), (2, 3)]),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(4, 6)),
)


@given(STEERINGS)
def test_a_steering_survives_its_way_between_processes(steering):
    wire = steering.to_wire()
    assert json.loads(json.dumps(wire)) == wire and Steering.from_wire(wire) == steering


@given(STEERINGS, STEERINGS)
def test_salts_are_equal_exactly_for_equal_steerings(one, other):
    assert (one.salt("a") == other.salt("a")) == (one == other)


@given(STEERINGS)
def test_other_numbers_and_other_given_salts_have_other_salts(steering):
    salts = {steering.salt(digest, given) for digest in "ab" for given in (None, "x", "y")}
    assert len(salts) == 6


@given(STEERINGS, st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_counts_of_chunks_add_up(steering, lengths):
    total, position, chosen = sum(lengths), 0, []
    for length in lengths:
        chosen += steering.selected(position, length)
        position += length
    assert chosen == list(steering.selected(0, total))
    ends = range(steering.start, total if steering.end is None else min(total, steering.end))
    assert chosen == list(ends)
    assert steering.count(0, total) == len(ends) * len(steering.layers)
