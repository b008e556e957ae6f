"""Arguments: numbers of numpy are numbers, and what is wrong is named before anything runs."""

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import tiny_model

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    SteeringVector,
    add_metric_cols,
    addition_operator,
    addition_vectors,
    apply_activation_additions,
    extract_activations,
    mean_aggregator,
    read_activations,
    record_activations,
    sweep,
    sweep_logits,
    sweep_perplexity,
    train_steering_vector,
    working_window,
)
from common.arguments import integer
from common.checking.pristine import assert_pristine, snapshot
from common.places.blocks import check_vector, get_block
from common.places.sites import Site, parse_site

PAIRS = [("I love you", "I hate you")]
INPUTS = {"input_ids": torch.tensor([[5, 9, 30, 2, 7]])}
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def half(tokenizer):
    return tiny_model("GPT-2", len(tokenizer)).half()


def vector(size: float = 10.0, dtype: torch.dtype = torch.float32) -> SteeringVector:
    return SteeringVector({1: torch.full((32,), size, dtype=dtype)})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**INPUTS).logits


# --- what lies outside the dtype of the model ---


@pytest.mark.parametrize("size, multiplier", [(10, 1e4), (1e6, 1.0), (-10, 1e4), (10, -1e4)])
def test_a_product_outside_the_dtype_is_refused(half, tokenizer, size, multiplier):
    """In fp16 they would be inf, and the logits nan; the same in a sweep and for a mechanism."""
    before = snapshot(half)
    says = "after multiplication by .*: float16, in which the model runs, ends at 6.55e[+]04"
    with pytest.raises(ValueError, match=f"the vector of layer 1 holds 1e[+]0[56] {says}"):
        vector(size).patch_activations(half, multiplier=multiplier)
    with pytest.raises(ValueError, match=f"'v' at layer 1 holds 1e[+]0[56] {says}"):
        sweep_logits(
            half, tokenizer, Grid({"v": vector(size)}, [1], [0.5, multiplier]), ["You"], **QUIET
        )
    with pytest.raises(ValueError, match=f"the steering vector holds .* {says}"):
        check_vector(half, 1, (multiplier * vector(size)).layer_activations[1])
    assert_pristine(half, before)


def test_an_addition_outside_the_dtype_is_refused(half, tokenizer):
    """Its coefficient times the activations that are read."""
    with (
        pytest.raises(
            ValueError, match=r"prompt='You'\) holds .* float16, in which the model runs"
        ),
        apply_activation_additions(half, tokenizer, [ActivationAddition(1e5, 2, "You")]),
    ):
        pass
    assert torch.isfinite(
        next(iter(addition_vectors(half, tokenizer, [ActivationAddition(10, 2, "You")]).values()))
    ).all()


def test_a_product_inside_the_dtype_is_added(half, tokenizer):
    """At the edge of fp16; and a vector in fp16 whose product only float32 holds."""
    assert torch.isfinite(logits(half)).all()
    with vector(60000).apply(half):
        assert torch.isfinite(logits(half)).all()
    own = tiny_model("GPT-2", 64)
    with vector(10, torch.float16).apply(own, multiplier=1e4):
        found = logits(own)
    with vector(1e5).apply(own):
        assert torch.equal(logits(own), found)
    own = tiny_model("GPT-2", len(tokenizer))
    one, other = (
        sweep_logits(own, tokenizer, Grid({"v": given}, [1], [coeff]), ["You"], **QUIET)[
            "kl"
        ].tolist()
        for given, coeff in ((vector(10, torch.float16), 1e4), (vector(1e5), 1.0))
    )
    assert one == other and one[-1] > 0


# --- numbers of numpy are numbers ---


def test_an_integer_is_returned_as_an_int():
    """One of numpy as well; `least` itself is allowed, and None allows every integer."""
    assert [type(integer(value, "n")) for value in (0, np.int64(3))] == [int, int]
    assert integer(2, "n", least=2) == 2 and integer(-7, "n", least=None) == -7
    with pytest.raises(ValueError, match="integer of 0 or more as n"):
        integer(-1, "n")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, torch.tensor(3)])
def test_what_is_not_an_integer_is_refused(value):
    """A bool, a float, a text, one that is too small."""
    with pytest.raises(ValueError, match=r"expected an integer of 1 or more as n, got") as raised:
        integer(value, "n", least=1)
    assert repr(value) in str(raised.value)


def test_integers_of_numpy(model, tokenizer):
    """As layers, keys, read indices, batch sizes and blocks: what those of Python give."""
    three, last = np.int64(3), np.int32(-1)
    wanted = train_steering_vector(
        model, tokenizer, PAIRS, [3, 5], read_token_index=-1, batch_size=2
    )
    found = train_steering_vector(
        model, tokenizer, PAIRS, np.array([3, -1]), read_token_index=last, batch_size=np.int64(2)
    )
    assert list(found.layer_activations) == [3, 5] and all(
        type(layer) is int for layer in found.layer_activations
    )
    torch.testing.assert_close(found.layer_activations, wanted.layer_activations, atol=0, rtol=0)
    again = SteeringVector({three: wanted.layer_activations[3]})
    assert [type(layer) for layer in again.layer_activations] == [int]
    with again.apply(model, min_token_index=np.int64(1), multiplier=np.float32(0.5)):
        found = logits(model)
    with again.apply(model, min_token_index=1, multiplier=0.5):
        assert torch.equal(logits(model), found)
    read = read_activations(
        model, tokenizer, ["I love you"], [three], read_token_index=[np.int64(1)]
    )
    torch.testing.assert_close(
        read, read_activations(model, tokenizer, ["I love you"], [3], read_token_index=1)
    )
    with torch.no_grad(), record_activations(model, layer_nums=[three]) as records:
        model(**INPUTS)
    assert list(records) == [3]
    assert get_block(model, three) is get_block(model, 3)
    assert (
        parse_site(three) == Site(3, "resid_pre") and type(parse_site((three, "mlp")).layer) is int
    )
    assert ActivationAddition(np.float32(2), three, "You") == ActivationAddition(2, 3, "You")


def test_numbers_of_numpy_times_a_vector():
    """From the left, from the right, and as a divisor."""
    for product in (
        np.float32(2) * vector(),
        vector() * np.int64(2),
        np.float64(2) * vector(),
        vector() / np.float32(0.5),
    ):
        assert isinstance(product, SteeringVector) and torch.equal(
            product.layer_activations[1], torch.full((32,), 20.0)
        )


# --- what is not a number, a list or a function ---

WRONG_NUMBERS = [
    True,
    "2",
    None,
    torch.tensor(2.0),
    np.bool_(True),
    float("nan"),
    np.float32("inf"),
    10**400,
]


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=repr)
def test_what_is_not_a_number(model, tokenizer, wrong):
    """As multiplier, coefficient, and coefficient of a sweep."""
    own = SteeringVector({1: torch.ones(model.config.hidden_size)})
    for says, use in {
        "multiplier": lambda: own.patch_activations(model, multiplier=wrong),
        "multiplier of a row": lambda: own.patch_activations(model, multiplier=[1.0, wrong]),
        "coefficient": lambda: ActivationAddition(wrong, 1, "You"),
        "coefficient,": lambda: sweep(model, tokenizer, Grid({"v": own}, [1], [wrong]), ["You"]),
    }.items():
        with pytest.raises(ValueError, match=f"expected a finite number as {says}"):
            use()


def test_a_list_is_no_coefficient(model, tokenizer):
    """As a multiplier it has one number for each row."""
    own = SteeringVector({1: torch.ones(model.config.hidden_size)})
    with pytest.raises(ValueError, match="expected a finite number as coefficient"):
        ActivationAddition([1.0], 1, "You")
    with pytest.raises(ValueError, match="expected a finite number as coefficient"):
        sweep(model, tokenizer, Grid({"v": own}, [1], [[1.0]]), ["You"])
    for none in ([], torch.empty(0)):
        with pytest.raises(ValueError, match="expected a number for each row as multiplier"):
            own.patch_activations(model, multiplier=none)


@pytest.mark.parametrize("wrong", [True, "2", 1.0, None, torch.tensor(1), np.float64(1)], ids=repr)
def test_what_is_not_a_layer(model, tokenizer, wrong):
    """In a list of layers, as a block, a place and a key."""
    own = SteeringVector({1: torch.ones(model.config.hidden_size)})
    for use in (
        lambda: train_steering_vector(model, tokenizer, PAIRS, [wrong]),
        lambda: read_activations(model, tokenizer, ["You"], [wrong]),
        lambda: record_activations(model, layer_nums=[wrong]).__enter__(),
        lambda: sweep(model, tokenizer, Grid({"v": own}, [wrong], [1.0]), ["You"]),
        lambda: get_block(model, wrong),
        lambda: ActivationAddition(1, (wrong, "mlp"), "You"),
        lambda: SteeringVector({wrong: torch.ones(model.config.hidden_size)}),
        lambda: read_activations(model, tokenizer, ["You"], [1], read_token_index=wrong),
        lambda: read_activations(model, tokenizer, ["You"], [1], batch_size=wrong),
    ):
        with pytest.raises(ValueError, match="layer|expected|cannot read"):
            use()


@pytest.mark.parametrize(
    "layers", [1, "1", np.int64(1), torch.tensor(1), np.array(1), 1.0, True], ids=repr
)
def test_a_single_layer_is_a_list_too(model, tokenizer, layers):
    """Wherever layers are given; nothing is run."""
    own = SteeringVector({1: torch.ones(model.config.hidden_size)})
    handle = model.transformer.register_forward_pre_hook(
        lambda *_: pytest.fail("a forward pass was run")
    )
    try:
        for use in (
            lambda: train_steering_vector(model, tokenizer, PAIRS, layers),
            lambda: extract_activations(model, tokenizer, PAIRS, layers),
            lambda: read_activations(model, tokenizer, ["You"], layers),
            lambda: record_activations(model, layer_nums=layers).__enter__(),
            lambda: sweep(model, tokenizer, Grid({"v": own}, layers, [1.0]), ["You"]),
            lambda: sweep_logits(model, tokenizer, Grid({"v": own}, layers, [1.0]), ["You"]),
            lambda: sweep_perplexity(
                model, tokenizer, Grid({"v": own}, layers, [1.0]), ["You are"]
            ),
        ):
            with pytest.raises(
                ValueError,
                match=(
                    "expected a list of layer numbers as layers, got .* a single layer is a"
                    " list too"
                ),
            ):
                use()
        with pytest.raises(ValueError, match="expected a list of numbers as coeffs, got 1.0"):
            sweep(model, tokenizer, Grid({"v": own}, [1], 1.0), ["You"])
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "wrong",
    ["add", 3, addition_operator, torch.ones(3), lambda hidden: hidden],
    ids=["text", "number", "factory", "tensor", "one"],
)
def test_what_is_not_an_operator(model, wrong):
    """A name, a factory that was not called, another function: before the model gets a hook."""
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=(
            r"expected a function of two tensors as operator, for example addition_operator\(\),"
            r" got "
        ),
    ):
        SteeringVector({1: torch.ones(model.config.hidden_size)}).patch_activations(
            model, operator=wrong
        )
    assert_pristine(model, before)
    for right in (
        torch.add,
        torch.nn.CosineSimilarity(),
        lambda hidden, vector, scale=2: scale * vector,
        lambda *both: both[1],
    ):
        SteeringVector({1: torch.ones(model.config.hidden_size)}).patch_activations(
            model, operator=right
        ).remove()


@pytest.mark.parametrize("wrong", ["mean", mean_aggregator, None], ids=["text", "factory", "None"])
def test_what_is_not_an_aggregator(model, tokenizer, wrong):
    """Before anything is read."""
    handle = model.transformer.register_forward_pre_hook(
        lambda *_: pytest.fail("a forward pass was run")
    )
    try:
        with pytest.raises(
            ValueError,
            match=(
                r"expected a function of two tensors as aggregator, for example"
                r" mean_aggregator\(\), got "
            ),
        ):
            train_steering_vector(model, tokenizer, PAIRS, aggregator=wrong)
    finally:
        handle.remove()


# --- tables ---


@pytest.fixture(scope="module")
def tables(tokenizer):
    own = tiny_model("GPT-2", len(tokenizer))
    arguments = own, tokenizer, Grid({"v": vector()}, [1], [-1.0, 1.0]), ["You are", "I love"]
    metrics = {"length": lambda texts: [len(text) for text in texts]}
    sampling = Sampling(max_new_tokens=3, temperature=0.0)
    rows = sweep(*arguments, metrics, sampling=sampling, **QUIET)
    return rows, sweep_perplexity(*arguments, **QUIET)


def test_working_window_in_another_order(tables):
    """The metric is a name and comes last; each table is where it belongs."""
    rows, costs = tables
    for wrong, name in (
        ((rows, "length", costs), "costs"),
        ((costs, rows, "length"), "rows"),
        ((rows, rows, "length"), "costs"),
        (("length", rows, costs), "rows"),
        ((rows, None, "length"), "costs"),
    ):
        with pytest.raises(
            ValueError,
            match=(
                rf"expected as {name} what sweep\w* returned, as in working_window\(rows, costs,"
                r" metric\); got "
            ),
        ):
            working_window(*wrong)
    with pytest.raises(ValueError, match="no column 'tone': the table has steering"):
        working_window(rows, costs, "tone")
    assert working_window(rows, costs, "length").reason


def test_columns_for_a_sweep(tables):
    """Its prompts and completions are found by their names, and joined like other tables'."""
    rows, _ = tables
    found = add_metric_cols(rows, {"text": list})
    assert found["text"].tolist() == (rows["prompt"] + rows["completion"]).tolist()
    renamed = rows.rename(columns={"prompt": "prompts", "completion": "completions"})
    assert add_metric_cols(renamed, {"text": list})["text"].tolist() == found["text"].tolist()
    with pytest.raises(ValueError, match="no column 'prompts': the table has texts"):
        add_metric_cols(pd.DataFrame({"texts": ["a"]}), {"text": list})
    with pytest.raises(
        ValueError, match="expected a table and metrics by name, got DataFrame and <"
    ):
        add_metric_cols(rows, list.copy)
    with pytest.raises(ValueError, match="expected a table and metrics by name, got list"):
        add_metric_cols(["a"], {"text": list})
