"""Recording: what modules give and get, with hooks that are gone afterwards."""

import pytest
import torch
from architectures import tiny_model
from torch import nn

from common import SteeringVector, assert_pristine, get_block, get_hidden, snapshot
from common.passes.recording import record_pass, recording
from common.places.sites import Site, find_site

INPUTS = {"input_ids": torch.tensor([[5, 9, 30, 2, 7], [1, 2, 3, 4, 5]])}


def places(model, *layers):
    """Where blocks are read and what they give: `find_site` names both."""
    return {
        Site(layer, part): find_site(model, Site(layer, part))
        for layer in layers
        for part in ("resid_pre", "resid_post")
    }


@torch.no_grad()
def test_what_is_recorded_are_the_hidden_states():
    """As `hidden_states` of transformers; at an input the tensor, at an output all of it."""
    model, found = tiny_model("GPT-2", 64), {}
    before = snapshot(model)
    with recording(places(model, 0, 1), found.__setitem__):
        hidden = model(**INPUTS, output_hidden_states=True).hidden_states
    assert_pristine(model, before)
    for layer in (0, 1):
        assert torch.equal(get_hidden(found[Site(layer, "resid_pre")]), hidden[layer])
    assert torch.equal(get_hidden(found[Site(0, "resid_post")]), hidden[1])


@torch.no_grad()
def test_steering_around_the_block_is_seen():
    """Also that of the recorded layer itself."""
    model, found = tiny_model("GPT-2", 64), {}
    vector, place = torch.ones(32), {0: (get_block(model, 1), "output")}
    with recording(place, found.__setitem__):
        model(**INPUTS)
    unsteered = get_hidden(found[0])
    with SteeringVector({1: vector}).apply(model), recording(place, found.__setitem__):
        model(**INPUTS)
    torch.testing.assert_close(get_hidden(found[0]), unsteered + vector)


def test_the_hooks_go_after_an_exception():
    """One of the pass, or of what records."""

    def fail(key, given):
        raise RuntimeError("full")

    model = tiny_model("GPT-2", 64)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="full"), recording(places(model, 1), fail):
        model(**INPUTS)
    assert_pristine(model, before)


@torch.no_grad()
def test_a_recorded_pass_ends_after_the_last_place():
    """Blocks above it do not run; each place gives what is kept of it."""
    model, runs = tiny_model("GPT-2", 64), []
    handle = get_block(model, 1).register_forward_hook(lambda *_: runs.append(1))
    found = record_pass(
        lambda: model(**INPUTS), places(model, 0), lambda site, hidden: hidden.shape[:2]
    )
    handle.remove()
    assert found == {Site(0, "resid_pre"): (2, 5), Site(0, "resid_post"): (2, 5)} and not runs


def test_an_input_by_keyword_is_seen():
    """Some models call their blocks so."""

    class Block(nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1

    block, given, found = Block(), torch.ones(1, 2, 3), {}
    with recording({"in": (block, "input"), "out": (block, "output")}, found.__setitem__):
        block(hidden_states=given)
    assert torch.equal(found["in"], given) and torch.equal(found["out"], given + 1)
