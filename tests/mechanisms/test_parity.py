"""The six mechanisms do the same: five equal the plain hook, which equals a pass written by hand.

The law behind all of it: steered hidden states = unsteered hidden states + vector, at every
position of every row, in every forward pass. hypothesis draws the cases; the first and the last
layer are always among them.
"""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import NEW, Steering, logits_equal, read_states, steered_ids
from support import PROMPTS
from torch import Tensor
from transformers import BatchEncoding, GPT2Config, TopPLogitsWarper

from common import embedded
from common.checking.pristine import assert_pristine, snapshot
from common.loading import copy_sharing_weights
from common.places.positions import with_position_ids
from repository.agreement import tolerance

LAST = GPT2Config.from_pretrained(embedded.FOLDER).n_layer - 1


class Case(NamedTuple):
    """What is drawn: where, how much, on how many rows, and how tokens are generated."""

    layer: int
    coeff: float
    padded: bool
    use_cache: bool = True
    sampled: bool = False


def passes() -> st.SearchStrategy[Case]:
    """Draw cases of a single pass."""
    coeffs = st.sampled_from([1.0, -1.0, 0.0])
    return st.builds(Case, st.integers(0, LAST), coeffs, st.booleans())


def generations() -> st.SearchStrategy[Case]:
    """Draw cases of generation, with and without the cache, greedy and sampled."""
    flags = st.booleans()
    return st.tuples(passes(), flags, flags).map(
        lambda drawn: drawn[0]._replace(use_cache=drawn[1], sampled=drawn[2])
    )


# At both ends every pair of values of the other dimensions; both ends together, every triple.
ENDS = [
    Case(layer, 1.0 if padded == first else -1.0, padded, use_cache, (padded == use_cache) == first)
    for layer, first in ((0, True), (LAST, False))
    for padded in (False, True)
    for use_cache in (False, True)
]


def in_cases(drawn: st.SearchStrategy[Case], ends: list[Case], count: int = 10) -> Callable:
    """Run a test at the first and the last layer, and in so many drawn cases at any layer."""

    def decorate(test: Callable) -> Callable:
        for case in ends:
            test = example(case=case)(test)
        return settings(max_examples=count)(given(case=drawn)(test))

    return decorate


in_passes = in_cases(passes(), [case for case in ENDS if case.use_cache])
in_generations = in_cases(generations(), ENDS)


@pytest.fixture(scope="session")
def steering(tokenizer, batch, plus) -> Callable[[Case], Steering]:
    """Turn a case into the inputs, the layer and the vector."""
    alone = tokenizer(PROMPTS[0], return_tensors="pt")
    return lambda case: Steering(batch if case.padded else alone, case.layer, case.coeff * plus)


@pytest.fixture(scope="session")
def ids_of_the_hook(hooks, steering) -> Callable[[Case], list[list[int]]]:
    """Return what the plain hook generates, once for all mechanisms."""
    return cache(lambda case: steered_ids(hooks, steering(case), case.use_cache, case.sampled))


# A GPT-2 written out by hand, with the model's own weights.


@torch.no_grad()
def forward_by_hand(
    model, ids: Tensor, mask: Tensor, layer: int | None = None, vector: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return all resid_post [layers, batch, pos, d_model] and logits, steered after `layer`."""
    gpt2, heads, states = model.transformer, model.config.n_head, []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    visible = (
        torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        & mask.bool()[:, None, None, :]
    )
    hidden = gpt2.wte(ids) + gpt2.wpe(positions)  # [batch, pos, d_model]
    for number, block in enumerate(gpt2.h):
        projected = block.attn.c_attn(block.ln_1(hidden)).split(hidden.shape[-1], dim=-1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected)
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # [batch, head, pos, pos]
        pattern = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        hidden = hidden + block.attn.c_proj((pattern @ value).transpose(1, 2).flatten(-2))
        hidden = hidden + block.mlp(block.ln_2(hidden))
        if number == layer:
            hidden = hidden + vector
        states.append(hidden)
    return torch.stack(states), model.lm_head(gpt2.ln_f(hidden))


def generate_by_hand(
    model, inputs, layer: int, vector: Tensor, do_sample: bool = False, top_p: float = 1.0
) -> Tensor:
    """Return `NEW` more tokens for every row, padded after its end of text; without any cache."""
    ids, mask, end = inputs["input_ids"], inputs["attention_mask"], model.config.eos_token_id
    going = torch.ones(len(ids), 1, dtype=torch.bool)
    for _ in range(NEW):
        scores = forward_by_hand(model, ids, mask, layer, vector)[1][:, -1]  # [batch, vocab]
        if do_sample:
            token = TopPLogitsWarper(top_p)(ids, scores).softmax(-1).multinomial(1)
        else:
            token = scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token.where(going, end)], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        going = going & (token != end)
        if not going.any():
            break
    return ids


@in_passes
def test_hook_equals_forward_by_hand(hooks, model, steering, case):
    """resid_post of every block, and the logits, are those of the pass written by hand."""
    inputs, layer, vector = steering(case)
    states, scores = forward_by_hand(model, *inputs.values(), layer, vector)
    real = inputs["attention_mask"].bool()
    with hooks.mechanism.steer(hooks.wrapped, layer, vector):
        torch.testing.assert_close(
            hooks.mechanism.logits(hooks.wrapped, inputs)[real], scores[real], rtol=0, atol=1e-4
        )
        for number, state in enumerate(states):
            read = hooks.mechanism.read(hooks.wrapped, inputs, number)
            torch.testing.assert_close(read[real], state[real], rtol=0, atol=1e-4)


@in_generations
def test_hook_generates_as_by_hand(ids_of_the_hook, model, steering, case):
    """Greedy and sampled ids, with and without the cache, are those of the pass written by hand."""
    torch.manual_seed(0)
    options = {"do_sample": True, "top_p": 0.9} if case.sampled else {}
    expected = generate_by_hand(model, *steering(case), **options)
    assert ids_of_the_hook(case) == expected.tolist()


@given(data=st.data())
def test_steered_is_unsteered_plus_vector(hooks, model, tokenizer, data):
    """For any vector, layer and prompts, hidden states move by the vector at each real position."""
    prompts = data.draw(
        st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3), label="prompts"
    )
    layer = data.draw(st.integers(0, model.config.num_hidden_layers - 1), label="layer")
    seed, coeff = (
        data.draw(st.integers(0, 99), label="seed"),
        data.draw(st.floats(-30, 30), label="coeff"),
    )
    vector = coeff * torch.randn(
        model.config.hidden_size, generator=torch.Generator().manual_seed(seed)
    )
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    unsteered = hooks.mechanism.read(hooks.wrapped, inputs, layer)
    with hooks.mechanism.steer(hooks.wrapped, layer, vector):
        steered = hooks.mechanism.read(hooks.wrapped, inputs, layer)
    assert torch.equal(steered[real], (unsteered + vector)[real])


# Every mechanism against the plain hook.


@in_passes
def test_logits_equal_the_hooks(bench, hooks, steering, case):
    """Steered logits are those of the plain hook, within the mechanism's tolerance."""
    logits_equal(bench, hooks, steering(case))


@in_generations
def test_ids_equal_the_hooks(bench, ids_of_the_hook, steering, case):
    """Greedy and sampled ids are those of the plain hook, with and without the cache."""
    assert steered_ids(bench, steering(case), case.use_cache, case.sampled) == ids_of_the_hook(case)


@in_passes
def test_read_equals_the_hooks(bench, hooks, steering, case):
    """`read` gives resid_post of any layer as the hook does, steered at a middle layer or not."""
    inputs, layer, vector = steering(case)
    steered = Steering(inputs, LAST // 2, vector) if case.coeff else None
    mine, theirs = (read_states(each, inputs, layer, steered) for each in (bench, hooks))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance(bench.mechanism.name))


@in_passes
def test_zero_vector_changes_nothing(bench, steering, case):
    """Steering by zero gives the unsteered logits, to the last bit."""
    mechanism, wrapped = bench
    inputs, layer, vector = steering(case)
    with mechanism.steer(wrapped, layer, 0 * vector):
        steered = mechanism.logits(wrapped, inputs)
    assert torch.equal(steered, mechanism.logits(wrapped, inputs))


def test_row_alone_equals_row_in_padded_batch(bench, tokenizer, batch, layer, plus):
    """A row's steered states and logits do not depend on the rows beside it, nor on its padding."""
    mechanism, wrapped = bench
    with mechanism.steer(wrapped, layer, plus):
        together = mechanism.read(wrapped, batch, layer), mechanism.logits(wrapped, batch)
        for row, prompt in enumerate(PROMPTS):
            inputs = tokenizer(prompt, return_tensors="pt")
            alone = mechanism.read(wrapped, inputs, layer), mechanism.logits(wrapped, inputs)
            for one, all_rows in zip(alone, together, strict=True):
                torch.testing.assert_close(
                    all_rows[row, -one.shape[1] :], one[0], rtol=0, atol=1e-4
                )


def test_a_masked_token_is_as_if_absent(bench, batch, plus):
    """Positions are counted from the mask: a row gives what it gives without a masked token."""
    mechanism, wrapped = bench
    mask = batch["attention_mask"].clone()
    row = int(mask.sum(-1).argmax())
    gap = mask.shape[1] - 3
    mask[row, gap] = 0
    inputs, real = BatchEncoding({**batch, "attention_mask": mask}), mask[row].bool()
    ids = batch["input_ids"][row, real][None]
    alone = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with mechanism.steer(wrapped, 1, plus):
        for call in (
            lambda given: mechanism.read(wrapped, given, 1),
            lambda given: mechanism.logits(wrapped, given),
        ):
            torch.testing.assert_close(call(inputs)[row, real], call(alone)[0], rtol=0, atol=1e-4)


def test_hidden_states_end_after_the_final_norm(hooks, model, batch, plus):
    """The last of `hidden_states` is not a resid_post: it comes after the final layer norm.

    Earlier entries are resid_post. Nothing may be compared with `hidden_states[-1]` but the norm of
    what was read.
    """
    last = model.config.num_hidden_layers - 1
    with hooks.mechanism.steer(hooks.wrapped, last, plus), torch.no_grad():
        states = hooks.wrapped(**with_position_ids(batch), output_hidden_states=True).hidden_states
        read = hooks.mechanism.read(hooks.wrapped, batch, last)
        assert torch.equal(states[-1], model.transformer.ln_f(read)) and not torch.allclose(
            states[-1], read
        )
        assert torch.equal(states[last], hooks.mechanism.read(hooks.wrapped, batch, last - 1))


@pytest.fixture(scope="module")
def in_bfloat16(model, tokenizer, hooks):
    """A bf16 model and its weights in fp32: the truth that bf16 arithmetic rounds."""
    small = copy.deepcopy(model).to(torch.bfloat16)
    return small, copy.deepcopy(small).float()


def test_bfloat16_is_within_its_own_rounding(
    bench, hooks, in_bfloat16, tokenizer, batch, layer, plus
):
    """In bf16 no mechanism is further from the truth than the plain hook, but for luck in rounding.

    The truth is the plain hook in fp32 on the same (bf16) weights and vector; its distance to the
    plain hook in bf16 is what bf16 costs whoever adds a vector. Wrapper, baukit and nnsight round
    at the same places and must be equal to the last bit. The other two round at other places, about
    as often: their errors are others, of the same size. So the root mean square over all logits,
    which hardly varies, may be 1.5 times the hook's, and the largest 2.5 times.
    """
    (small, exact), vector, real = in_bfloat16, plus.bfloat16(), batch["attention_mask"].bool()

    def steered(mechanism, wrapped) -> Tensor:
        with mechanism.steer(wrapped, layer, vector):
            return mechanism.logits(wrapped, batch)[real].float()

    truth = steered(hooks.mechanism, exact)
    reference = steered(hooks.mechanism, copy_sharing_weights(small))
    scores = steered(bench.mechanism, bench.mechanism.wrap(copy_sharing_weights(small), tokenizer))
    allowed, error = (reference - truth).abs(), (scores - truth).abs()
    if tolerance(bench.mechanism.name) == 0:
        assert torch.equal(scores, reference)
    assert error.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt()
    assert error.max() <= 2.5 * allowed.max()


# What cannot be done is refused before anything is changed.

WRONG_LAYERS = (-1, 10**6, True, 1.0, "0", None)
WRONG_VECTORS = {
    "too long": lambda vector: torch.cat([vector, vector[:1]]),
    "with a batch dimension": lambda vector: vector[None],
    "a single number": lambda vector: vector[0],
    "integers": lambda vector: vector.long(),
    "nan": lambda vector: vector.clone().index_fill_(0, torch.tensor([3]), math.nan),
    "infinite": lambda vector: vector.clone().index_fill_(0, torch.tensor([3]), math.inf),
    "a list": lambda vector: vector.tolist(),
}


@pytest.mark.parametrize("wrong", WRONG_LAYERS)
def test_wrong_layer_is_refused(bench, batch, plus, wrong):
    """`steer` and `read` refuse a layer that does not exist, and change nothing."""
    mechanism, wrapped = bench
    before = snapshot(wrapped)
    with (
        pytest.raises(ValueError, match="does not exist: expected an integer from 0 to"),
        mechanism.steer(wrapped, wrong, plus),
    ):
        raise AssertionError("steered all the same")
    with pytest.raises(ValueError, match="does not exist: expected an integer from 0 to"):
        mechanism.read(wrapped, batch, wrong)
    assert_pristine(wrapped, before)


@pytest.mark.parametrize("wrong", WRONG_VECTORS)
def test_wrong_vector_is_refused(bench, plus, wrong):
    """`steer` refuses a vector of another shape, of integers or not finite, and changes nothing."""
    mechanism, wrapped = bench
    before = snapshot(wrapped)
    with (
        pytest.raises(ValueError, match="expected a"),
        mechanism.steer(wrapped, 1, WRONG_VECTORS[wrong](plus)),
    ):
        raise AssertionError("steered all the same")
    assert_pristine(wrapped, before)
