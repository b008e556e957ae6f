"""The names of a place in all vocabularies: each is true, and leads to the others and back."""

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from common.checking.steering import assert_same_place
from common.passes.padding import encode
from common.places.blocks import get_block, get_hidden
from common.places.names import Place, translate, where_is
from common.places.sites import Site, find_site


@pytest.fixture(scope="module")
def models(tokenizer) -> dict:
    return {name: tiny_model(name, len(tokenizer)) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def tiny(request, models):
    return models[request.param]


def test_names_are_true(tiny, tokenizer):
    """All names lead to the same activations; hidden_states[-1] is not resid_post of a layer."""
    inputs = encode(tokenizer, ["I think that dogs are"])
    seen = {}
    handles = [
        get_block(tiny, layer).register_forward_hook(
            lambda m, a, out, layer=layer: seen.update({layer: get_hidden(out)})
        )
        for layer in range(LAYERS)
    ]
    states = tiny(**inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(LAYERS):
        place = where_is(tiny, layer)
        assert place.layer == layer and tiny.get_submodule(
            place.module.removesuffix(" output")
        ) is get_block(tiny, layer)
        assert find_site(tiny, Site(layer, "resid_post"))[0] is get_block(tiny, layer)
        assert eval(place.nnsight.removesuffix(".output"), {"model": tiny}) is get_block(
            tiny, layer
        )
        if layer < LAYERS - 1:
            assert torch.equal(eval(place.hidden_states, {"hidden_states": states}), seen[layer])
            assert find_site(tiny, Site(layer + 1, "resid_pre"))[0] is get_block(tiny, layer)
    assert not torch.allclose(states[-1], seen[LAYERS - 1], atol=1e-3)
    assert (
        where_is(tiny, LAYERS - 1)[3:5] == (None, None) and where_is(tiny, LAYERS - 1).post is None
    )


def test_the_six_names_of_the_published_layer(model):
    """Layer 3 of the embedded model, as everybody calls it."""
    assert where_is(model, 3) == Place(
        3,
        "transformer.h.3 output",
        "blocks.3.hook_resid_post",
        "blocks.4.hook_resid_pre",
        "hidden_states[4]",
        "model.transformer.h[3].output",
        "layer 3 decoder_block",
        "layer 4",
    )
    assert (
        where_is(model, "hidden_states[0]").layer is None
        and where_is(model, "layer 0").resid_pre == "blocks.0.hook_resid_pre"
    )
    for name in (
        "transformer.h[3] output",
        "transformer.h[3].output",
        "model.transformer.h[3].output[0]",
        "hidden_states[-3]",
        Site(4, "resid_pre"),
        (3, "decoder_block"),
    ):
        assert where_is(model, name).layer == 3


@given(
    name=st.sampled_from(list(ARCHITECTURES)),
    layer=st.integers(0, LAYERS - 1),
    source=st.sampled_from(Place._fields[1:]),
    to=st.sampled_from(Place._fields),
)
def test_round_trips(models, name, layer, source, to):
    """To any vocabulary and back is the same name; where there is none, the error says so."""
    here = where_is(models[name], layer)
    text, wanted = getattr(here, source), getattr(here, to)
    if text is None:
        assert layer == LAYERS - 1
    elif wanted is None:
        with pytest.raises(ValueError, match="the last block gives it"):
            translate(models[name], text, to)
    else:
        assert translate(models[name], text, to) == wanted
        assert translate(models[name], text, "layer") == layer
        assert where_is(models[name], text) == here
        assert_same_place(models[name], layer, text, *(part for part in here[1:] if part))


@pytest.mark.parametrize(
    "name, says",
    [
        ("hidden_states[-1]", "after the final layer norm"),
        ("hidden_states[6]", "after the final layer norm"),
        ("hidden_states[7]", "is not a place between two blocks"),
        ("hidden_states[-8]", "is not a place between two blocks"),
        ("blocks.6.hook_resid_pre", "is not a place between two blocks"),
        ("blocks.6.hook_resid_post", "is not a place between two blocks"),
        ("blocks.3.hook_attn_out", "is not a place between two blocks"),
        ("layer 6", "is not a place between two blocks"),
        ("transformer.h.6 output", "is not a place between two blocks"),
        ("wte", "is not a place between two blocks"),
        (6, "layer 6 does not exist"),
        (-1, "layer -1 does not exist"),
        (("3", "resid_pre"), "unknown site"),
    ],
)
def test_other_names_are_refused(model, name, says):
    with pytest.raises(ValueError, match=says):
        where_is(model, name)


def test_translation_that_does_not_exist_is_refused(model):
    with pytest.raises(ValueError, match="block 0 reads it and no block gives it"):
        translate(model, "blocks.0.hook_resid_pre", "layer")
    with pytest.raises(ValueError, match="no block reads it; hidden_states"):
        translate(model, "blocks.5.hook_resid_post", "hidden_states")
    with pytest.raises(ValueError, match="expected a name and one of layer, module"):
        translate(model, "layer 3", "baukit")
    with pytest.raises(ValueError, match="expected a name"):
        translate(model, 3, "post")
