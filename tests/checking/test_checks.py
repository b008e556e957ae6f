"""Checks of steering code: they pass what is right, name what is wrong, and leave no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import common as checks
from common import assert_adds
from common.checking.pristine import assert_pristine, snapshot
from common.checking.watching import PROMPTS
from common.loading import copy_sharing_weights
from common.passes.padding import encode
from common.places.blocks import get_block, get_hidden, with_hidden
from common.places.names import Place, where_is
from common.texts.generation import logits
from common.vectors.activation_additions import apply_activation_additions, get_x_vector
from common.vectors.steering_vector import SteeringVector

LAYER = 2
VECTOR = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tokenizer) -> dict:
    return {name: tiny_model(name, len(tokenizer)) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def tiny(request, models) -> Iterator:
    """A tiny model of each architecture; afterwards it must be as it was."""
    before = snapshot(models[request.param])
    yield models[request.param]
    assert_pristine(models[request.param], before)


@pytest.fixture
def gpt2(models) -> Iterator:
    before = snapshot(models["GPT-2"])
    yield models["GPT-2"]
    assert_pristine(models["GPT-2"], before)


@contextmanager
def hooked(model, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain hook that replaces what a block gives."""
    handle = get_block(model, layer).register_forward_hook(
        lambda module, args, output: with_hidden(output, change(get_hidden(output)))
    )
    try:
        yield
    finally:
        handle.remove()


def adding(model, layer: int = LAYER, vector: Tensor = VECTOR) -> Callable:
    return lambda: hooked(model, layer, lambda hidden: hidden + vector)


# --- mistakes: what they do to the hidden states [batch, pos, d_model] ---


def first_row_only(hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:1] + VECTOR, hidden[1:]])


def units_of_the_first_row(hidden: Tensor) -> Tensor:
    """`output[0][:, :s] += …` on a bare tensor."""
    changed = hidden.clone()
    changed[0][:, :2] += 3
    return changed


def from_the_fourth_of_the_pass(hidden: Tensor) -> Tensor:
    return hidden + (torch.arange(hidden.shape[1]) >= 3)[:, None] * VECTOR


def last_of_the_pass(hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:, :-1], hidden[:, -1:] + VECTOR], dim=1)


def fourth_of_the_pass(hidden: Tensor) -> Tensor:
    changed = hidden.clone()
    changed[:, 3] += VECTOR
    return changed


def prompts_only(hidden: Tensor) -> Tensor:
    return hidden + VECTOR if hidden.shape[1] > 1 else hidden


def by_length(hidden: Tensor) -> Tensor:
    return hidden + VECTOR * hidden.shape[1]


def nothing(hidden: Tensor) -> Tensor:
    return hidden


def check_rows(model, tokenizer, steering, **kwargs) -> None:
    checks.assert_steers_every_row(model, tokenizer, steering, **kwargs)


def check_adds(model, tokenizer, steering, **kwargs) -> None:
    assert_adds(model, tokenizer, steering, LAYER, VECTOR, **kwargs)


WRONG = [
    (check_rows, first_row_only, r"rows \[1, 2\] of a batch of 3 do not move.*output\[0\]"),
    (check_rows, units_of_the_first_row, r"rows \[1, 2\].*output\[0\]"),
    (
        check_rows,
        from_the_fourth_of_the_pass,
        "moved at its tokens .* and alone at .*counted from the padding",
    ),
    (check_rows, nothing, "no prompt is moved anywhere"),
    (
        checks.assert_steers_generated_tokens,
        from_the_fourth_of_the_pass,
        "with a KV cache 0 of 4 .*length of the pass",
    ),
    (checks.assert_steers_generated_tokens, prompts_only, "with a KV cache 0 of 4"),
    (
        checks.assert_steers_generated_tokens,
        fourth_of_the_pass,
        "use_cache=True, fails with IndexError",
    ),
    (
        checks.assert_steers_generated_tokens,
        by_length,
        "moved otherwise with a KV cache than without",
    ),
    (checks.assert_steers_generated_tokens, nothing, "neither prompt nor generated"),
    (
        checks.assert_leaves_generated_tokens,
        last_of_the_pass,
        "with a KV cache 4 of 4 .*only the prompt",
    ),
    (
        checks.assert_leaves_generated_tokens,
        lambda hidden: hidden + VECTOR,
        "with a KV cache 4 of 4",
    ),
    (check_adds, nothing, "nothing is moved"),
    (check_adds, first_row_only, r"row 1 is moved at its tokens \[\]; expected \[0, 1, 2"),
    (check_adds, lambda hidden: hidden + 2 * VECTOR, "2 times the vector.*open twice"),
    (check_adds, lambda hidden: hidden - VECTOR, "-1 times the vector.*sign"),
    (check_adds, lambda hidden: hidden + VECTOR / 2, "0.5 times the vector.*scale"),
    (check_adds, lambda hidden: hidden + VECTOR.roll(1), "another vector"),
]


@pytest.mark.parametrize(
    "check, change, says",
    WRONG,
    ids=[f"{check.__name__}-{change.__name__}" for check, change, _ in WRONG],
)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "OPT"])
def test_wrong_steering_is_named(models, tokenizer, name, check, change, says):
    """The message says what was found, and the model is as it was."""
    before = snapshot(models[name])
    with pytest.raises(AssertionError, match=f"(?s){says}"):
        check(models[name], tokenizer, lambda: hooked(models[name], LAYER, change))
    assert_pristine(models[name], before)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_wrong_layer_is_named(tiny, tokenizer, layer):
    with pytest.raises(
        AssertionError,
        match=(
            f"first place that moves is resid_post of layer {layer}; expected resid_post of layer 2"
        ),
    ):
        check_adds(tiny, tokenizer, adding(tiny, layer))


def test_steering_further_up_is_named(gpt2, tokenizer):
    """Twice in two places: at the layer all is well."""

    @contextmanager
    def both() -> Iterator[None]:
        with adding(gpt2)(), adding(gpt2, 3)():
            yield

    with pytest.raises(AssertionError, match="something acts further up: resid_post of layer 3"):
        check_adds(gpt2, tokenizer, both)


def test_steering_that_leaves_its_hook_is_named(gpt2, tokenizer):
    """From its second time on it steers twice; what it left is its own to take off."""
    victim = copy_sharing_weights(gpt2)

    @contextmanager
    def leaving() -> Iterator[None]:
        get_block(victim, LAYER).register_forward_hook(
            lambda module, args, output: with_hidden(output, get_hidden(output) + VECTOR)
        )
        yield

    with pytest.raises(AssertionError, match="hook that was left behind"):
        check_adds(victim, tokenizer, leaving)
    with pytest.raises(AssertionError, match="logits of row 0|is moved at"):
        check_rows(victim, tokenizer, leaving)


def test_steering_twice_at_one_layer_is_named(gpt2, tokenizer):
    @contextmanager
    def twice() -> Iterator[None]:
        with adding(gpt2)(), adding(gpt2)():
            yield

    with pytest.raises(AssertionError, match="2 times the vector"):
        check_adds(gpt2, tokenizer, twice)


def test_another_dtype_is_named(gpt2, tokenizer):
    """At the last layer nothing after it refuses fp64 before the final norm does."""
    model = copy_sharing_weights(gpt2)
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    with pytest.raises(
        AssertionError, match="steered hidden states are torch.float64; expected torch.float32"
    ):
        assert_adds(model, tokenizer, adding(model, 3, VECTOR.double()), 3, VECTOR)


def test_a_run_without_position_ids_is_named(gpt2, tokenizer):
    """The check takes the reader's own way to run the model."""

    def run(model, inputs):
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    with pytest.raises(AssertionError, match="without any steering.*row 0.*position ids"):
        check_rows(gpt2, tokenizer, adding(gpt2), logits=run)


# --- right code passes ---


def test_the_six_mechanisms_pass(bench, tokenizer, layer, plus):
    mechanism, wrapped = bench
    before = snapshot(wrapped)

    def steering():
        return mechanism.steer(wrapped, layer, plus)

    checks.assert_steers_every_row(wrapped, tokenizer, steering, logits=mechanism.logits)
    checks.assert_steers_generated_tokens(
        wrapped, tokenizer, steering, logits=mechanism.logits, generate=mechanism.generate
    )
    assert_adds(wrapped, tokenizer, steering, layer, plus, logits=mechanism.logits)
    assert_pristine(wrapped, before)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_vectors_pass_on_all_architectures(tiny, tokenizer, layer):
    vector = SteeringVector({layer: VECTOR})
    checks.assert_steers_every_row(tiny, tokenizer, lambda: vector.apply(tiny))
    checks.assert_steers_generated_tokens(tiny, tokenizer, lambda: vector.apply(tiny), PROMPTS)
    assert_adds(tiny, tokenizer, lambda: vector.apply(tiny), layer, VECTOR)
    assert_adds(
        tiny,
        tokenizer,
        lambda: vector.apply(tiny, token_indices=[0, -1]),
        layer,
        VECTOR,
        positions=[0, -1],
    )
    with pytest.raises(AssertionError, match=r"row 0 is moved at its tokens \[0, .*expected"):
        assert_adds(
            tiny, tokenizer, lambda: vector.apply(tiny, token_indices=[0, -1]), layer, VECTOR
        )


@pytest.mark.parametrize(
    "where", [{"min_token_index": 1}, {"min_token_index": 6}, {"token_indices": slice(-1, None)}]
)
def test_steering_of_the_answer_passes(tiny, tokenizer, where):
    """Also where the prompt is not steered at all, or is too short."""

    def steering():
        return SteeringVector({LAYER: VECTOR}).apply(tiny, **where)

    checks.assert_steers_generated_tokens(tiny, tokenizer, steering)
    checks.assert_steers_every_row(tiny, tokenizer, steering)


@pytest.mark.parametrize("act_name", [0, 2])
def test_activation_additions_pass(tiny, tokenizer, act_name):
    """They keep to the prompt; from the input of block 0 on as well."""

    def steering():
        return apply_activation_additions(
            tiny, tokenizer, get_x_vector("Love", "Hate", 4, act_name)
        )

    checks.assert_steers_every_row(tiny, tokenizer, steering)
    checks.assert_leaves_generated_tokens(tiny, tokenizer, steering, PROMPTS)
    with pytest.raises(
        AssertionError, match="with a KV cache 0 of 4 .*assert_leaves_generated_tokens"
    ):
        checks.assert_steers_generated_tokens(tiny, tokenizer, steering)


def test_steering_by_the_input_of_the_next_block_passes(gpt2, tokenizer):
    """resid_pre of block 3 is resid_post of block 2, whatever module the hook is on."""

    @contextmanager
    def steering() -> Iterator[None]:
        handle = get_block(gpt2, 3).register_forward_pre_hook(
            lambda module, args: (args[0] + VECTOR, *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()

    check_rows(gpt2, tokenizer, steering)
    check_adds(gpt2, tokenizer, steering)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_sixteen_bit_passes(tokenizer, name):
    model = tiny_model(name, len(tokenizer)).bfloat16()
    vector = SteeringVector({LAYER: 10 * VECTOR})
    checks.assert_steers_generated_tokens(model, tokenizer, lambda: vector.apply(model))
    assert_adds(model, tokenizer, lambda: vector.apply(model), LAYER, 10 * VECTOR)
    with pytest.raises(AssertionError, match="twice"):
        assert_adds(model, tokenizer, lambda: vector.apply(model, multiplier=2), LAYER, 10 * VECTOR)


def test_bad_arguments_are_refused(gpt2, tokenizer):
    steering = adding(gpt2)
    with pytest.raises(ValueError, match="lambda: my_steer"):
        check_rows(gpt2, tokenizer, steering())
    with pytest.raises(ValueError, match="two lengths"):
        check_rows(gpt2, tokenizer, steering, prompts=["I", "You"])
    with pytest.raises(ValueError, match="training mode"):
        check_rows(copy_sharing_weights(gpt2).train(), tokenizer, steering)
    with pytest.raises(ValueError, match="other than 0"):
        assert_adds(gpt2, tokenizer, steering, LAYER, 0 * VECTOR)
    with pytest.raises(ValueError, match="shape"):
        assert_adds(gpt2, tokenizer, steering, LAYER, VECTOR[:5])
    with pytest.raises(ValueError, match="did not run"):
        check_rows(gpt2, tokenizer, steering, logits=lambda model, inputs: torch.zeros(1))
    with pytest.raises(KeyError):  # an error inside a pass goes through, and leaves nothing
        check_rows(gpt2, tokenizer, lambda: hooked(gpt2, 1, lambda hidden: {}[0]))
    with pytest.raises(ValueError, match="ended at once"):
        checks.assert_steers_generated_tokens(gpt2, tokenizer, steering, new_tokens=1)


# --- names of places ---


@given(
    name=st.sampled_from(list(ARCHITECTURES)),
    layer=st.integers(0, LAYERS - 2),
    source=st.sampled_from(Place._fields),
    to=st.sampled_from(Place._fields),
)
def test_one_block_off_is_refused(models, name, layer, source, to):
    one, other = (
        getattr(where_is(models[name], layer), source),
        getattr(where_is(models[name], layer + 1), to),
    )
    if other is not None:
        with pytest.raises(
            AssertionError,
            match=f"resid_post of layer {layer}, and .* is resid_post of layer {layer + 1}",
        ):
            checks.assert_same_place(models[name], one, other)


# --- prompts, sampling, numbers ---


def test_lengths(tokenizer):
    checks.assert_same_length(tokenizer, "Love", "Hate")
    with pytest.raises(
        AssertionError, match=r"1 tokens \['Love'\]; 2 tokens \['I', ' love'\].*pad the shorter"
    ):
        checks.assert_same_length(tokenizer, "Love", "I love")
    with pytest.raises(ValueError, match="two texts"):
        checks.assert_same_length(tokenizer, "Love")


def test_bos(tokenizer):
    bos = tokenizer.bos_token
    checks.assert_bos(tokenizer, "Love", "Hate", [5, 6])
    checks.assert_bos(
        tokenizer, bos + "Love", encode(tokenizer, PROMPTS), torch.tensor([0, 5])
    )  # padding is the same token
    with pytest.raises(AssertionError, match=r"\[1, 0\] BOS tokens.*TransformerLens"):
        checks.assert_bos(tokenizer, bos + "Love", "Hate")
    with pytest.raises(AssertionError, match=r"\[1, 1, 1, 0\] BOS tokens"):
        checks.assert_bos(tokenizer, encode(tokenizer, PROMPTS), "Hate")
    with pytest.raises(AssertionError, match=r"\[2\] BOS tokens.*puts another before it"):
        checks.assert_bos(tokenizer, bos + bos + "Love")
    for wrong in ((), ("",), (torch.zeros(2, 3, dtype=torch.long),), (5,)):
        with pytest.raises(ValueError, match="one token or more"):
            checks.assert_bos(tokenizer, *wrong)


def test_top_k(model):
    state, size = torch.random.get_rng_state(), model.config.vocab_size
    with pytest.raises(AssertionError, match=f"among 50 of {size} tokens.*top_k=0"):
        checks.assert_no_top_k(model, temperature=1.5)
    with pytest.raises(AssertionError, match=f"among 7 of {size} tokens"):
        checks.assert_no_top_k(model, top_k=7)
    checks.assert_no_top_k(model, top_k=0)
    checks.assert_no_top_k(model, top_k=0, top_p=0.3, do_sample=True)
    assert torch.equal(torch.random.get_rng_state(), state)


@given(
    seed=st.integers(0, 1000),
    log_size=st.floats(-12, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_precision_is_what_rounding_leaves(seed, log_size, dtype):
    """As many bits are said to be left of a difference as rounding both activations leaves."""
    draw = torch.randn(2, 2048, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = draw[0], draw[0] + 2**log_size * draw[1]
    error = ((a.to(dtype).double() - b.to(dtype).double()) - (a - b)).norm()
    bits = torch.log2((a - b).norm() / error).item()
    assert abs(checks.precision_of_difference(a, b, dtype) - max(0.0, bits)) < 0.7


def test_precision_errors():
    a = torch.full((4,), 1000.0)
    checks.assert_precise_difference(a, a + 1)
    with pytest.raises(
        AssertionError,
        match=(
            "difference of 2 between activations of 2e[+]03 in bfloat16, significant bits left at"
            " most: 0"
        ),
    ):
        checks.assert_precise_difference(a, a + 1, dtype=torch.bfloat16)
    assert checks.precision_of_difference(a, a) == 0
    for b in (a[:2], a.long()):
        with pytest.raises(ValueError, match="two floating-point tensors of one shape"):
            checks.precision_of_difference(a, b)


def test_random_directions(model, tokenizer, loaded):
    """The preset stands out, ten times as much does not, and a random direction never does."""
    layer, coeff = loaded.preset.layer, loaded.preset.coeff

    def steer(vector):
        return SteeringVector({layer: vector}).apply(model)

    ends = []
    for word in ("Love", "Hate"):
        inputs = tokenizer(word, return_tensors="pt")
        with torch.no_grad():
            ends.append(model(**inputs, output_hidden_states=True).hidden_states[layer + 1][0, -1])
    direction = (ends[0] - ends[1]) / (ends[0] - ends[1]).norm()
    wanted = tokenizer(" wonderful")["input_ids"][0]
    inputs = encode(tokenizer, ["I believe old books are"])

    def chance() -> float:
        return logits(model, inputs)[0, -1].log_softmax(-1)[wanted].item()

    checks.assert_beats_random(model, tokenizer, steer, coeff * direction)
    checks.assert_beats_random(model, tokenizer, steer, coeff * direction, chance)
    with pytest.raises(
        AssertionError,
        match=f"of norm {10 * coeff:.3g}, moves the measure by .*any direction would do",
    ):
        checks.assert_beats_random(model, tokenizer, steer, 10 * coeff * direction)
    noise = torch.randn(len(direction), generator=torch.Generator().manual_seed(5))
    with pytest.raises(AssertionError, match="random directions of that norm"):
        checks.assert_beats_random(model, tokenizer, steer, coeff * noise / noise.norm())
    with pytest.raises(ValueError, match="1 or more as controls"):
        checks.assert_beats_random(model, tokenizer, steer, direction, controls=0)


@pytest.mark.parametrize("way", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_on_the_backward_pass_is_left_behind_too(way):
    """Steering has no business there, and who looks for it finds it."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = snapshot(module)
    handle = getattr(module[0], way)(lambda *given: None)
    with pytest.raises(AssertionError, match="hooks on 0 changed"):
        assert_pristine(module, before)
    handle.remove()
    assert_pristine(module, before)
