"""Reading: right for any padding and batch size, no work too many, nothing left on the model."""

import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common.checking.pristine import assert_pristine, snapshot
from common.places.blocks import get_block, get_hidden
from common.vectors.reading import read_activations, record_activations

PROMPTS = [
    "I think dogs are",
    "Love.",
    "My neighbour is a man who lives behind the mill. He leaves at seven",
    "You",
    "Love.",
]
texts = st.lists(
    st.sampled_from(
        [*PROMPTS, "The old library is on the", "Hate", "We talk about weddings constantly."]
    ),
    min_size=1,
    max_size=6,
)


@torch.no_grad()
def alone(model, tokenizer, prompt: str, layer: int) -> torch.Tensor:
    """resid_post of a prompt alone, [pos, d_model], from transformers' own hidden states."""
    inputs = tokenizer(prompt, return_tensors="pt")
    caught = []
    handle = model.get_submodule(f"transformer.h.{layer}").register_forward_hook(
        lambda m, a, out: caught.append(out)
    )
    model(**inputs)
    handle.remove()
    return (caught[0][0] if isinstance(caught[0], tuple) else caught[0])[0]


@given(
    prompts=texts,
    batch_size=st.integers(1, 7),
    side=st.sampled_from(["left", "right"]),
    layer=st.sampled_from([0, 3, 5, -1]),
)
def test_read_equals_the_prompt_alone(model, tokenizer, prompts, batch_size, side, layer):
    """Batched = single, whatever the tokenizer's padding side, at the last token and the first."""
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        for index in (-1, 0):
            found = read_activations(
                model, tokenizer, prompts, [layer], read_token_index=index, batch_size=batch_size
            )
            wanted = torch.stack(
                [alone(model, tokenizer, prompt, layer % 6)[index] for prompt in prompts]
            )
            assert list(found) == [layer % 6]
            torch.testing.assert_close(found[layer % 6], wanted, atol=2e-5, rtol=1e-5)
    finally:
        tokenizer.padding_side = before


def test_read_indices_by_number_list_and_callable(model, tokenizer):
    """A number for all, one for each, or a callable; one prompt may be read in two places."""
    prompts = ["I think dogs are", "I think dogs are", "You"]
    single = {prompt: alone(model, tokenizer, prompt, 2) for prompt in prompts}
    listed = read_activations(model, tokenizer, prompts, [2], read_token_index=[0, 2, -1])[2]
    torch.testing.assert_close(
        listed, torch.stack([single[prompts[0]][0], single[prompts[0]][2], single["You"][-1]])
    )
    called = read_activations(
        model, tokenizer, prompts, [2], read_token_index=lambda prompt: 0 if prompt == "You" else 1
    )[2]
    torch.testing.assert_close(
        called, torch.stack([single[prompts[0]][1], single[prompts[0]][1], single["You"][0]])
    )


def test_each_prompt_is_computed_once_and_no_further_than_needed(model, tokenizer):
    """Of five prompts, four distinct, at layer 2: four rows go through block 2, none through 3."""
    rows = {2: 0, 3: 0}
    handles = [
        model.transformer.h[layer].register_forward_pre_hook(
            lambda m, args, layer=layer: rows.update({layer: rows[layer] + len(args[0])})
        )
        for layer in rows
    ]
    handles.append(
        model.lm_head.register_forward_pre_hook(
            lambda m, args: pytest.fail("the LM head was computed")
        )
    )
    try:
        read_activations(model, tokenizer, PROMPTS, [0, 2], batch_size=2)
        assert rows == {2: 4, 3: 0}
        read_activations(model, tokenizer, PROMPTS, batch_size=2)
        assert rows == {2: 8, 3: 4}
    finally:
        for handle in handles:
            handle.remove()


def test_batches_hold_prompts_of_like_length(model, tokenizer):
    """Sorted by length: long prompts share a batch, so that little is padded."""
    sizes = []
    handle = model.transformer.wte.register_forward_pre_hook(
        lambda m, args: sizes.append(args[0].shape)
    )
    prompts = ["You", PROMPTS[2], "Love", PROMPTS[2] + " today"]
    try:
        read_activations(model, tokenizer, prompts, [0], batch_size=2)
    finally:
        handle.remove()
    assert sizes[0][1] > 10 and sizes[1] == (2, 1)


def test_the_bar_counts_the_prompts_that_are_computed(model, tokenizer, capsys):
    """Its total is honest: four distinct prompts."""
    read_activations(
        model, tokenizer, PROMPTS, [0], batch_size=3, show_progress=True, tqdm_desc="reading"
    )
    shown = capsys.readouterr().err
    assert "reading: 100%" in shown and "4/4" in shown


def test_mode_parameters_and_tokenizer_are_as_they_were(tokenizer):
    """A model in training mode is read without dropout; it and the tokenizer stay as they are."""
    model = tiny_model("GPT-2", len(tokenizer))
    wanted = read_activations(model, tokenizer, PROMPTS, batch_size=3)
    model.train()
    model.transformer.h[1].eval()
    before = snapshot(model)
    pad, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        found = read_activations(model, tokenizer, PROMPTS, batch_size=3)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = pad
    assert_pristine(model, before)
    assert model.training and not model.transformer.h[1].training
    assert not any(acts.requires_grad for acts in found.values())
    torch.testing.assert_close(found, wanted)


def test_nothing_is_left_after_an_error(model, tokenizer):
    """An error in the middle of a pass goes through, and takes all hooks with it."""
    before = snapshot(model)
    handle = model.transformer.h[1].register_forward_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))
    )
    with pytest.raises(RuntimeError, match="boom"):
        read_activations(model, tokenizer, PROMPTS, [3])
    handle.remove()
    assert_pristine(model, before)
    out = model(**tokenizer("You", return_tensors="pt"), output_hidden_states=True)
    assert len(out.hidden_states) == 7


def test_inference_mode(model, tokenizer):
    """Works inside torch.inference_mode."""
    with torch.inference_mode():
        found = read_activations(model, tokenizer, PROMPTS, [1])[1].clone()
    torch.testing.assert_close(found, read_activations(model, tokenizer, PROMPTS, [1])[1])


def test_bfloat16_and_move_to_cpu(tokenizer):
    """Activations keep the dtype of the model."""
    model = tiny_model("GPT-2", len(tokenizer)).bfloat16()
    found = read_activations(model, tokenizer, PROMPTS, move_to_cpu=True)
    assert all(
        acts.dtype == torch.bfloat16 and acts.device.type == "cpu" for acts in found.values()
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"prompts": []}, "list of prompts"),
        ({"prompts": "You"}, "list of prompts"),
        ({"prompts": ["You", 3]}, "expected texts, or lists of messages .* as prompts, got 3"),
        ({"prompts": [""]}, "the prompt '' has 0 tokens"),
        ({"prompts": ["You " * 300]}, "has [3-6][0-9][0-9] tokens; expected 1 to 256"),
        (
            {"read_token_index": 1},
            r"cannot read token 1 of 'You': it has 1 tokens, so expected -1 to 0",
        ),
        ({"read_token_index": -2}, "cannot read token -2 of 'You'"),
        ({"read_token_index": torch.tensor(0)}, r"cannot read token tensor\(0\) of 'You'"),
        ({"read_token_index": lambda prompt: None}, "cannot read token None"),
        ({"read_token_index": [0, 0]}, "one read index for each of 1 prompts, got 2"),
        ({"batch_size": 0}, "integer of 1 or more as batch_size, got 0"),
        (
            {"layers": [6]},
            (
                r"layer 6 does not exist: GPT2LMHeadModel has 6 layers .* transformer.h.0 to"
                r" transformer.h.5"
            ),
        ),
        ({"layers": [-7]}, "layer -7 does not exist"),
        ({"layers": [0, -6]}, "layer 0 is given twice"),
        ({"layers": []}, "at least one layer"),
        (
            {"layer_type": "mlpp"},
            "unknown layer_type 'mlpp': expected one of decoder_block, self_attn, mlp",
        ),
    ],
)
def test_bad_input_is_refused_before_any_pass(model, tokenizer, wrong, says):
    """What was given and what fits, and no forward pass."""
    handle = model.transformer.register_forward_pre_hook(
        lambda *_: pytest.fail("a forward pass was run")
    )
    try:
        with pytest.raises(ValueError, match=says):
            read_activations(model, tokenizer, **{"prompts": ["You"], **wrong})
    finally:
        handle.remove()


def test_record_keeps_every_pass(model, tokenizer, batch):
    """One tensor a pass and layer, equal to hidden_states; copies are detached, the hooks gone."""
    before = snapshot(model)
    with record_activations(model, layer_nums=[1, -2]) as records:
        out = model(**batch, output_hidden_states=True)
        model(**batch)
    assert_pristine(model, before)
    assert sorted(records) == [1, 4] and [len(found) for found in records.values()] == [2, 2]
    torch.testing.assert_close(records[1][0], out.hidden_states[2])
    assert not records[1][0].requires_grad


def test_record_can_keep_the_graph(model, batch):
    """Without cloning, the tensors of the model itself are kept, with their gradients."""
    with record_activations(model, "mlp", clone_activations=False, layer_nums=[0]) as records:
        model(**batch)
    assert records[0][0].requires_grad


def test_record_stops_after_an_exception(model):
    """Nothing is left."""
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"), record_activations(model):
        raise RuntimeError("boom")
    assert_pristine(model, before)


def test_a_part_that_gives_another_type_is_named():
    """A part whose output is not a tensor: one sentence."""

    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    model = tiny_model("GPT-2", 20)
    model.transformer.h[0].mlp = Odd()
    with (
        pytest.raises(
            ValueError, match="expected a tensor, or a tuple that begins with one, got dict"
        ),
        record_activations(model, "mlp", layer_nums=[0]),
    ):
        model.transformer.h[0].mlp(torch.zeros(1))


def test_a_prompt_may_fill_all_positions(model, tokenizer):
    """A longer one is refused."""
    word, limit = " dogs", model.config.n_positions
    assert len(tokenizer(word * limit)["input_ids"]) == limit
    found = read_activations(model, tokenizer, [word * limit], [0])[0]
    assert found.shape == (1, model.config.hidden_size)
    with pytest.raises(ValueError, match=f"tokens; expected 1 to {limit}"):
        read_activations(model, tokenizer, [word * (limit + 1)], [0])


@torch.no_grad()
def test_what_is_recorded_stays_when_the_model_writes_over_it(model, tokenizer):
    """A copy is kept by default."""
    inputs = tokenizer("I think dogs are", return_tensors="pt")

    def overwrite(module, args, output):
        get_hidden(output).zero_()

    with record_activations(model, layer_nums=[2]) as wanted:
        model(**inputs)
    with record_activations(model, layer_nums=[2]) as found:
        handle = get_block(model, 2).register_forward_hook(overwrite)
        try:
            model(**inputs)
        finally:
            handle.remove()
    assert torch.equal(found[2][0], wanted[2][0])


def test_an_output_of_another_shape_is_named(model, tokenizer):
    """Tokens of all rows in one row would be read at the wrong places."""
    block = get_block(model, 1)
    handle = block.register_forward_hook(
        lambda module, args, output: get_hidden(output).flatten(0, 1)[None]
    )
    try:
        with pytest.raises(
            ValueError, match=r"layer 1: expected an output \[batch, pos, d_model\]"
        ):
            read_activations(model, tokenizer, ["I think", "My dogs"], [1], batch_size=2)
    finally:
        handle.remove()
