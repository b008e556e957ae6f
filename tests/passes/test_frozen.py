"""Frozen attention: keys and values are those of the unsteered model, all else is steered."""

import copy
from contextlib import ExitStack, contextmanager

import pytest
import torch
from accelerate import cpu_offload
from architectures import ARCHITECTURES, D_MODEL, LAYERS, ODD, tiny_model
from support import a_vector, texts_of
from transformers import StaticCache

from common import (
    Condition,
    Grid,
    apply_activation_additions,
    frozen_attention,
    get_x_vector,
    sweep_logits,
)
from common.checking.pristine import assert_pristine, snapshot
from common.passes.padding import encode
from common.places.positions import with_position_ids
from common.texts.generation import logits
from common.vectors.reading import record_activations

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the", "You"]
# Models whose blocks do not all read keys and values of their own from a cache.
OTHERS = {"RecurrentGemma", "RWKV", "Mamba", "MiniMax", "Gemma 4, shared keys", "GPT-1"}


@contextmanager
def projections(model, given: dict | None, kept: dict):
    """Note what projections to keys and values give, or put something else in its place.

    GPT-2 has one module for queries, keys and values; Llama has one for each.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not name.endswith(("c_attn", "k_proj", "v_proj")):
                continue

            def hook(module, args, output, name=name):
                kept[name] = output.detach()
                if given is None:
                    return output
                if name.endswith("c_attn"):
                    queries = output.chunk(3, dim=-1)[0]
                    return torch.cat([queries, *given[name].chunk(3, dim=-1)[1:]], dim=-1)
                return given[name]

            stack.callback(module.register_forward_hook(hook).remove)
        yield


@pytest.mark.parametrize("name", ["embedded", "Llama"])
def test_keys_and_values_are_those_of_the_unsteered_model(model, tokenizer, name):
    """As when they are put in by hand, where the model computes them."""
    model = model if name == "embedded" else tiny_model(name, len(tokenizer))
    count = model.config.num_hidden_layers
    inputs = with_position_ids(encode(tokenizer, PROMPTS, None))
    real = inputs["attention_mask"].bool()
    for layers in ([0], [1, count - 2], [count - 1]):
        vector, unsteered = a_vector(model.config.hidden_size, layers), {}
        with torch.no_grad():
            with projections(model, None, unsteered):
                plain = model(**inputs).logits
            with projections(model, unsteered, {}), vector.apply(model):
                expected = model(**inputs).logits
            with vector.apply(model):
                free = model(**inputs).logits
            with frozen_attention(model), vector.apply(model):
                found = model(**inputs).logits
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[real], plain[real], atol=1e-2)
        # After the last block there is no attention that could read what was steered.
        assert torch.allclose(found[real], free[real], atol=1e-4) == (layers == [count - 1])


@pytest.mark.parametrize("name", [*ARCHITECTURES, *(name for name in ODD if name not in OTHERS)])
def test_a_frozen_text_is_the_same_however_it_is_read(tokenizer, name):
    """Alone or in a batch, with and without a cache, in whichever order the blocks were opened."""
    model = tiny_model(name, len(tokenizer))
    before, vector = snapshot(model), a_vector(D_MODEL, [0, LAYERS - 2])
    inputs, plain = encode(tokenizer, PROMPTS, None), texts_of(model, tokenizer, PROMPTS)
    with vector.apply(model):
        free = texts_of(model, tokenizer, PROMPTS)
    with frozen_attention(model), vector.apply(model):
        together, scores = texts_of(model, tokenizer, PROMPTS), logits(model, inputs)
        assert texts_of(model, tokenizer, PROMPTS, use_cache=False) == together
        assert [texts_of(model, tokenizer, [prompt])[0] for prompt in PROMPTS] == together
    with vector.apply(model), frozen_attention(model):
        assert texts_of(model, tokenizer, PROMPTS) == together
        assert torch.equal(logits(model, inputs), scores)
    assert plain != together != free
    assert_pristine(model, before)


def test_an_unsteered_model_is_itself(model, tokenizer):
    """And a steered one is free again afterwards, also after an error."""
    before, inputs = snapshot(model), encode(tokenizer, PROMPTS, None)
    plain, texts = logits(model, inputs), texts_of(model, tokenizer, PROMPTS)
    with frozen_attention(model):
        assert torch.equal(logits(model, inputs), plain)
        assert texts_of(model, tokenizer, PROMPTS) == texts
        output = model(**with_position_ids(inputs), use_cache=False)
        assert output.past_key_values is None
        output = model(**with_position_ids(inputs), use_cache=True)
        assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
        ids, mask = output.logits[:, -1:].argmax(-1), inputs["attention_mask"]
        more = {"attention_mask": torch.cat([mask, torch.ones_like(ids)], dim=1)}
        more["position_ids"] = more["attention_mask"].sum(-1, keepdim=True) - 1
        cache = output.past_key_values
        again = model(ids, **more, past_key_values=cache)
        assert again.past_key_values is cache and cache.get_seq_length() == mask.shape[1] + 1
        assert again.logits[:, -1].argmax(-1).tolist() == [text[1] for text in texts]
        first, *_ = model(**with_position_ids(inputs), return_dict=False)
        assert torch.equal(first, model(**with_position_ids(inputs)).logits)
    assert_pristine(model, before)
    with pytest.raises(KeyError), frozen_attention(model):
        raise KeyError
    assert_pristine(model, before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
)
def test_every_way_to_generate_is_frozen(model, tokenizer, options):
    """With a cache as without one; where positions count too."""
    vector = a_vector(model.config.hidden_size, [1])
    for settings in ({}, {"min_token_index": -1}):
        with frozen_attention(model), vector.apply(model, **settings):
            found = texts_of(model, tokenizer, PROMPTS, **options)
            caches = "prefill_chunk_size", "cache_implementation", "disable_compile"
            options = {name: it for name, it in options.items() if name not in caches}
            assert texts_of(model, tokenizer, PROMPTS, **options, use_cache=False) == found
        with vector.apply(model, **settings):
            assert texts_of(model, tokenizer, PROMPTS, **options) != found


def test_steering_of_every_kind_is_frozen(model, tokenizer):
    """Additions at the prompt reach generated tokens by attention only: frozen, they do not."""
    added = get_x_vector("Love", "Hate", 5.0, 3)
    plain, inputs = texts_of(model, tokenizer, PROMPTS[:1]), encode(tokenizer, PROMPTS[:1], None)
    last = logits(model, inputs)[0, -1]
    with apply_activation_additions(model, tokenizer, added):
        assert not torch.allclose(logits(model, inputs)[0, -1], last, atol=0.1)
    with frozen_attention(model), apply_activation_additions(model, tokenizer, added):
        assert texts_of(model, tokenizer, PROMPTS[:1]) == plain
    condition = Condition(torch.randn(model.config.hidden_size), 2, 0.0)
    vector = a_vector(model.config.hidden_size, [1])
    each = [float(one) for one in condition.holds(model, tokenizer, PROMPTS)]
    inputs = encode(tokenizer, PROMPTS, None)
    with frozen_attention(model):
        with vector.apply(model, condition=condition):
            found = logits(model, inputs)
        with vector.apply(model, multiplier=each):
            assert torch.equal(logits(model, inputs), found)


def test_other_hooks_see_one_pass(model, tokenizer):
    """The steered one."""
    vector, inputs = a_vector(model.config.hidden_size, [1]), encode(tokenizer, PROMPTS, None)
    with (
        frozen_attention(model),
        vector.apply(model),
        record_activations(model, layer_nums=[0, 1]) as records,
        torch.no_grad(),
    ):
        model(**with_position_ids(inputs))
    assert len(records[1]) == 1
    with record_activations(model, layer_nums=[0, 1]) as plain, torch.no_grad():
        model(**with_position_ids(inputs))
    real = inputs["attention_mask"].bool()
    moved = (records[1][0] - plain[1][0])[real]
    expected = vector.layer_activations[1].expand_as(moved)
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_memories_are_refused(tokenizer, name):
    model = tiny_model(name, len(tokenizer))
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be frozen"), frozen_attention(model):
        pass
    assert_pristine(model, before)


def test_an_offloaded_model_is_refused(tokenizer):
    """Its modules fetch their weights by hooks, which a copy without hooks would miss."""
    model = cpu_offload(tiny_model("Llama", len(tokenizer)))
    with pytest.raises(ValueError, match="not offloaded"), frozen_attention(model):
        pass


def test_in_training_keys_and_values_are_those_of_evaluation(model, tokenizer):
    """Without dropout, and without a gradient; queries have both."""
    model, inputs = copy.deepcopy(model).train(), encode(tokenizer, PROMPTS[:1], None)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    vector = a_vector(model.config.hidden_size, [0])
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(**inputs, use_cache=True).past_key_values
    with frozen_attention(model), vector.apply(model):
        output = model(**inputs, use_cache=True)
    assert output.logits.requires_grad and model.training
    for found, wanted in zip(output.past_key_values.layers, expected.layers, strict=True):
        assert torch.equal(found.keys, wanted.keys) and not found.keys.requires_grad
        assert torch.equal(found.values, wanted.values) and not found.values.requires_grad
    with torch.no_grad():
        model(**inputs, use_cache=True)
        again = model(**inputs, use_cache=True).past_key_values
    assert not torch.equal(again.layers[-1].keys, expected.layers[-1].keys)  # there is dropout


def test_a_model_that_was_compiled_before_is_frozen(tokenizer):
    """Compiled code does not look whether hooks came; here it was made with a hook by hand."""
    model = tiny_model("Llama", len(tokenizer))
    inputs, vector = encode(tokenizer, PROMPTS[:1], None), a_vector(D_MODEL, [0])
    with frozen_attention(model), vector.apply(model), torch.no_grad():
        expected = model(**inputs).logits
    added = vector.layer_activations[0]
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + added)
    model.compile(backend="eager")
    with torch.no_grad():
        free = model(**inputs).logits
        with frozen_attention(model):
            found = model(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, free)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, free, atol=1e-3)


def test_a_static_cache_is_filled_as_any_other(model, tokenizer):
    """By hand, in two parts, where the mask is made of what the cache has counted."""
    vector, inputs = a_vector(model.config.hidden_size, [1]), encode(tokenizer, PROMPTS[:1], None)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with frozen_attention(model), vector.apply(model), torch.no_grad():
        expected = model(**inputs).logits
        parts = inputs["input_ids"].tensor_split([2], dim=1)
        found = [model(part, past_key_values=cache).logits for part in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_gradient_checkpointing_is_refused(tokenizer):
    """It takes the cache away from attention, which then would be free; nothing else does."""
    model = tiny_model("Llama", len(tokenizer)).train()
    inputs, vector = encode(tokenizer, PROMPTS[:1], None), a_vector(D_MODEL, [0])
    with frozen_attention(model), vector.apply(model):
        expected = model(**inputs).logits
        model.gradient_checkpointing_enable()
        for _ in range(2):
            with pytest.raises(ValueError, match="was not frozen in this pass.*checkpointing"):
                model(**inputs)
        torch.testing.assert_close(model.eval()(**inputs).logits, expected)
        model.train().gradient_checkpointing_disable()
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_sweep_starts_from_the_model_as_it_is(model, tokenizer):
    grid = Grid({"v": a_vector(model.config.hidden_size, [1])})
    with frozen_attention(model), pytest.raises(ValueError, match="attention of the model is froz"):
        sweep_logits(model, tokenizer, grid, PROMPTS)
