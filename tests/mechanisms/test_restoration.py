"""Afterwards the model is as it was; and the detector finds whatever can be left behind."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support import Bench
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import BatchEncoding

from common import ActivationAddition, SteeringVector, apply_activation_additions
from common.checking.pristine import assert_pristine, copied_steering, differences, snapshot
from common.loading import copy_sharing_weights
from common.places.blocks import get_block
from common.places.positions import with_position_ids
from common.places.sites import Site
from common.sweeping.rows import RowSteering, steering_rows
from common.texts.generation import generate
from repository.mechanisms import load_mechanism


class Failure(Exception):
    """Raised by a test inside a block."""


@contextmanager
def left_as_it_was(bench: Bench, inputs: BatchEncoding) -> Iterator[Bench]:
    """Afterwards the model must look as before and give the same logits, bit for bit."""
    mechanism, wrapped = bench
    before, logits = snapshot(wrapped), mechanism.logits(wrapped, inputs)
    yield bench
    assert_pristine(wrapped, before)
    assert torch.equal(mechanism.logits(wrapped, inputs), logits)


@pytest.fixture
def untouched(bench, batch) -> Iterator[Bench]:
    """Each mechanism; after the test its model must be as it was."""
    with left_as_it_was(bench, batch):
        yield bench


def test_after_the_block(untouched, batch, layer, plus):
    """A block in which the model read, ran and generated leaves nothing behind, and did steer."""
    mechanism, wrapped = untouched
    unsteered = mechanism.logits(wrapped, batch)
    with mechanism.steer(wrapped, layer, plus):
        mechanism.read(wrapped, batch, layer)
        mechanism.generate(wrapped, batch, max_new_tokens=3)
        assert not torch.allclose(mechanism.logits(wrapped, batch), unsteered)


def test_after_reading_and_generating(untouched, batch, layer):
    """Reading and generating without steering leave nothing behind either."""
    mechanism, wrapped = untouched
    mechanism.read(wrapped, batch, layer)
    mechanism.generate(wrapped, batch, max_new_tokens=3)


def test_after_an_exception_in_the_block(untouched, batch, layer, plus):
    """An exception inside the block passes through and leaves nothing behind."""
    mechanism, wrapped = untouched

    def fail() -> None:
        with mechanism.steer(wrapped, layer, plus):
            mechanism.logits(wrapped, batch)
            raise Failure

    with pytest.raises(Failure):
        fail()


@pytest.mark.parametrize("call", ["read", "logits", "generate"])
def test_after_an_exception_in_the_forward_pass(untouched, model, batch, plus, call):
    """A forward pass that fails half way, after the steered block, leaves nothing behind."""
    mechanism, wrapped = untouched
    beyond = {**batch, "input_ids": torch.full_like(batch["input_ids"], model.config.vocab_size)}
    arguments = (3,) if call == "read" else ()

    with pytest.raises(IndexError), mechanism.steer(wrapped, 1, plus):
        getattr(mechanism, call)(wrapped, beyond, *arguments)


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 3), (3, 1)])
def test_after_two_nested_blocks(untouched, hooks, batch, plus, outer, inner):
    """Two blocks add up as two hooks do; leaving the inner keeps the outer; nothing stays."""
    mechanism, wrapped = untouched
    found = []
    for one, its_model in ((mechanism, wrapped), hooks):
        with one.steer(its_model, outer, plus):
            once = one.logits(its_model, batch)
            with one.steer(its_model, inner, -0.5 * plus):
                twice = one.logits(its_model, batch)
            assert torch.equal(one.logits(its_model, batch), once)
        found.append(twice[batch["attention_mask"].bool()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_after_a_refused_call_inside_a_block(untouched, batch, plus):
    """A refused call neither ends nor changes the steering around it."""
    mechanism, wrapped = untouched
    with mechanism.steer(wrapped, 1, plus):
        steered = mechanism.logits(wrapped, batch)
        with pytest.raises(ValueError, match="expected a"), mechanism.steer(wrapped, 1, plus[:-1]):
            pass
        assert torch.equal(mechanism.logits(wrapped, batch), steered)


def test_steering_twice_in_a_row_is_steering_once(untouched, batch, plus):
    """Nothing adds up from one block to the next."""
    mechanism, wrapped = untouched
    runs = []
    for _ in range(2):
        with mechanism.steer(wrapped, 1, plus):
            runs.append(mechanism.logits(wrapped, batch))
    assert torch.equal(*runs)


# The detector.


def _leave_wrapper(model: nn.Module) -> None:
    model.transformer.h[1] = nn.Sequential(model.transformer.h[1])


def _leave_patched_forward(model: nn.Module) -> None:
    block = get_block(model, 1)
    block.forward = block.forward  # an attribute of the instance, where the class had a method


def _leave_patched_class(model: nn.Module) -> None:
    block = get_block(model, 1)
    block.__class__ = type("Steered", (type(block),), {})


def _change_one_element(model: nn.Module) -> None:
    with torch.no_grad():
        bias = get_block(model, 1).mlp.c_proj.bias
        bias[5] = torch.nextafter(bias[5], torch.tensor(1e9))


def _replace_parameter(model: nn.Module) -> None:
    linear = get_block(model, 1).mlp.c_proj
    linear.bias = nn.Parameter(linear.bias.detach() + 1)


def _replace_by_an_equal_parameter(model: nn.Module) -> None:
    linear = get_block(model, 1).mlp.c_proj
    linear.bias = nn.Parameter(linear.bias.detach().clone())


def _remove_parameter(model: nn.Module) -> None:
    get_block(model, 1).mlp.c_proj.bias = None


def _change_buffer(model: nn.Module) -> None:
    model.get_submodule("a_module_with_a_buffer").number[0] = 1


def _noop(*args: object) -> None:
    """A hook that changes nothing is a hook all the same."""


PLACE = "module transformer.h.1 was added, removed, replaced or given another method or mode"
LEFT_BEHIND: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "hook": (
        "hooks on transformer.h.1 changed",
        lambda model: get_block(model, 1).register_forward_hook(_noop),
    ),
    "pre-hook": (
        "hooks on transformer.h.1 changed",
        lambda model: get_block(model, 1).register_forward_pre_hook(_noop),
    ),
    "backward hook": (
        "hooks on transformer.h.1 changed",
        lambda model: get_block(model, 1).register_full_backward_hook(_noop),
    ),
    "hook on the model": (
        "hooks on the model itself changed",
        lambda model: model.register_forward_hook(_noop),
    ),
    "hook on a child": (
        "hooks on transformer.h.1.mlp.c_proj changed",
        lambda model: get_block(model, 1).mlp.c_proj.register_forward_hook(_noop),
    ),
    "wrapper": (PLACE, _leave_wrapper),
    "patched forward": (PLACE, _leave_patched_forward),
    "patched class": (PLACE, _leave_patched_class),
    "one element of a parameter": (
        "parameter transformer.h.1.mlp.c_proj.bias changed",
        _change_one_element,
    ),
    "replaced parameter": ("parameter transformer.h.1.mlp.c_proj.bias changed", _replace_parameter),
    "parameter replaced by an equal one": (
        "parameter transformer.h.1.mlp.c_proj.bias changed",
        _replace_by_an_equal_parameter,
    ),
    "removed parameter": ("parameter transformer.h.1.mlp.c_proj.bias changed", _remove_parameter),
    "frozen parameter": (
        "parameter transformer.wte.weight changed",
        lambda model: model.transformer.wte.weight.requires_grad_(False),
    ),
    "buffer": ("parameter a_module_with_a_buffer.number changed", _change_buffer),
    "train mode": (PLACE, lambda model: model.train()),
    "train mode of one block": (PLACE, lambda model: get_block(model, 1).train()),
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_what_is_left_behind_is_named(model, what):
    """Whatever can be left behind on a torch model is found, and the message says where."""
    own, (saying, leave) = _own_copy(model), LEFT_BEHIND[what]
    before = snapshot(own)
    assert differences(own, before) == []
    handle = leave(own)
    with pytest.raises(AssertionError, match="the model is not as it was") as caught:
        assert_pristine(own, before)
    assert saying in str(caught.value).splitlines()
    if isinstance(handle, RemovableHandle):
        handle.remove()
        assert_pristine(own, before)


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy with weights of its own, and a buffer, which GPT-2 may have or not."""
    own = type(model)(model.config).eval()
    own.load_state_dict(model.state_dict())
    own.a_module_with_a_buffer = nn.Module()
    own.a_module_with_a_buffer.register_buffer("number", torch.zeros(2))
    return own


def test_edit_left_on_an_nnsight_model_is_found(model, tokenizer, plus):
    """An edit of nnsight changes no module, yet it is found; `clear_edits` removes it."""
    wrapped = load_mechanism("nnsight").wrap(copy_sharing_weights(model), tokenizer)
    before = snapshot(wrapped)
    with wrapped.edit(inplace=True):
        wrapped.transformer.h[1].output = wrapped.transformer.h[1].output + plus
    assert differences(wrapped, before) == ["nnsight edits on model changed"]
    wrapped.clear_edits()
    assert_pristine(wrapped, before)


def test_hook_left_on_a_bridge_is_found(model, tokenizer):
    """A hook of TransformerLens on a hook point is found, and gone after `reset_hooks`."""
    wrapped = load_mechanism("transformer_lens").wrap(copy_sharing_weights(model), tokenizer)
    before = snapshot(wrapped)
    wrapped.add_hook("blocks.1.hook_resid_post", lambda hidden, hook: hidden)
    assert any("hooks on" in line for line in differences(wrapped, before))
    wrapped.reset_hooks()
    assert_pristine(wrapped, before)


def test_plain_use_is_no_difference(model, batch):
    """Running and generating change nothing, though transformers keeps hooks of its own."""
    own = copy_sharing_weights(model)
    before = snapshot(own)
    with torch.no_grad():
        own(**with_position_ids(batch), output_hidden_states=True, output_attentions=True)
    generate(own, batch, max_new_tokens=3)
    generate(own, batch, max_new_tokens=3, do_sample=True)
    assert differences(own, before) == []


def test_snapshot_of_something_else_is_refused():
    """What is neither a module nor a wrapped one is refused by name."""
    with pytest.raises(ValueError, match="got str"):
        snapshot("a model")


def _vectors(model: torch.nn.Module, *layers: int) -> SteeringVector:
    return SteeringVector({layer: torch.ones(model.config.hidden_size) for layer in layers})


@pytest.mark.parametrize(
    "steer, places",
    [
        (lambda own: _vectors(own, 1, 3).apply(own), ["transformer.h.1", "transformer.h.3"]),
        (
            lambda own: apply_activation_additions(
                own, None, [ActivationAddition(2, 0, tokens=[3])]
            ),
            ["transformer.h.0"],
        ),
        (
            lambda own: steering_rows(
                own, [RowSteering(Site(2, "mlp"), torch.ones(1, own.config.hidden_size))]
            ),
            ["transformer.h.2.mlp"],
        ),
    ],
    ids=["vector", "addition", "rows"],
)
def test_a_copy_of_a_steered_model_is_found(model, batch, steer, places):
    """However it was steered; the model, and a copy made afterwards, are as they were."""
    own = copy_sharing_weights(model)
    before = snapshot(own)
    with steer(own):
        twin, taken = copy.deepcopy(own), snapshot(own)
        with _vectors(own, 1).apply(own):
            pass
        assert_pristine(own, taken)  # its own steering is no copy
    assert_pristine(own, before)
    found = [
        f"{path} was copied while it was steered, and stays steered: copy the model outside `apply`"
        for path in places
    ]
    assert copied_steering(twin) == places and differences(twin, snapshot(twin)) == found
    with pytest.raises(
        AssertionError,
        match=f"the model is not as it was:\n{places[0]} was copied while it was steered",
    ):
        assert_pristine(twin, snapshot(twin))
    again = copy.deepcopy(own)
    assert_pristine(again, snapshot(again))


def test_copy_is_pristine_and_keeps_hooks_to_itself(model):
    """A copy that shares weights starts without hooks, and its hooks are not the model's."""
    before = snapshot(model)
    own = copy_sharing_weights(model)
    get_block(own, 1).register_forward_hook(_noop)
    _leave_wrapper(own)
    assert_pristine(model, before)
