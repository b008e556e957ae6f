"""Rows of a batch with a steering of their own, and passes that start after a block."""

import copy
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from architectures import ARCHITECTURES, LAYERS, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, TopPLogitsWarper

from common import embedded
from common.checking.pristine import assert_pristine, snapshot
from common.loading import copy_sharing_weights
from common.passes.padding import encode
from common.places.blocks import get_hidden
from common.places.sites import Site
from common.sweeping.rows import RowSteering, row_deltas, steered_after, steering_rows
from common.sweeping.skipping import logits_from, prefilled_cache, record_blocks
from common.texts.generation import generate, logits
from common.texts.sampling import TopP
from common.vectors.activation_additions import (
    adding_spans,
    addition_vectors,
    apply_activation_additions,
    get_x_vector,
    with_bos,
)
from common.vectors.steering_vector import SteeringVector

CONFIG = json.loads((embedded.FOLDER / "config.json").read_text(encoding="utf-8"))
D_MODEL = CONFIG["n_embd"]  # of the embedded model
LOCATIONS = ("front", "mid", "back")
TEXTS = (
    "I think that they are on the old bridge behind the mill and",
    "My mother went to the old library on Monday because she",
    "The captain sailed to the garden and said that my neighbour",
)
NEW = 6


def noise(model, count: int, seed: int) -> torch.Tensor:
    """Vectors [count, d_model], about as long as the hidden states they are added to."""
    return 0.5 * torch.randn(
        count, model.config.hidden_size, generator=torch.Generator().manual_seed(seed)
    )


def batch_of(tokenizer, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Beginnings of texts, so many tokens long, padded on the left."""
    rows = [
        with_bos(tokenizer, TEXTS[number % len(TEXTS)])[:length]
        for number, length in enumerate(lengths)
    ]
    width = max(lengths)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def row_alone(inputs, number: int) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding."""
    start = int((inputs["attention_mask"][number] == 0).sum())
    return {name: values[number : number + 1, start:] for name, values in inputs.items()}


@contextmanager
def steered_alone(model, row: RowSteering | None):
    """The same steering for one row: `SteeringVector.apply`, or activation additions."""
    if row is None:
        context = nullcontext()
    elif row.location is None:
        context = SteeringVector({steered_after(row): row.vectors[0]}).apply(model)
    else:
        context = adding_spans(model, {(row.site, len(row.vectors)): row.vectors}, row.location)
    with context:
        yield


@st.composite
def batches(draw, shortest: int = 1):
    """Lengths of prompts, and how each row is steered, if at all."""
    lengths = draw(st.lists(st.integers(shortest, 9), min_size=1, max_size=4))
    rows = []
    for length in lengths:
        location = draw(st.sampled_from(("unsteered", None, *LOCATIONS)))
        if location == "unsteered":
            rows.append(None)
            continue
        part = draw(st.sampled_from(("resid_pre", "resid_post")))
        site = Site(draw(st.integers(location is None and part == "resid_pre", 5)), part)
        count = 1 if location is None else draw(st.integers(1, length))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        rows.append(
            RowSteering(site, 0.5 * torch.randn(count, D_MODEL, generator=generator), location)
        )
    return lengths, rows


# --- rows ---


@given(batches())
def test_a_row_of_a_batch_is_what_it_is_alone(model, tokenizer, drawn):
    """Logits at every token, steered and unsteered, whatever the rows beside it are steered by."""
    lengths, rows = drawn
    inputs = batch_of(tokenizer, lengths)
    with steering_rows(model, rows):
        together = logits(model, inputs)
    for number, row in enumerate(rows):
        alone = row_alone(inputs, number)
        with steered_alone(model, row):
            expected = logits(model, alone)[0]
        assert torch.allclose(together[number, -lengths[number] :], expected, atol=1e-4)


@pytest.mark.parametrize("location", LOCATIONS)
def test_rows_of_a_batch_as_people_steer_them(model, tokenizer, location):
    """A vector, an X-vector and nothing in one padded batch: the texts of three calls."""
    prompts = [
        "I went up to my friend and said",
        "My mother went to the old library on Monday and said",
        "I think that they are",
    ]
    vector, additions = noise(model, 1, 0), get_x_vector("I love", "I hate", 3, 4)
    (((site, _), vectors),) = addition_vectors(model, tokenizer, additions).items()
    rows = [RowSteering(Site(2, "resid_post"), vector), RowSteering(site, vectors, location), None]
    inputs = encode(tokenizer, prompts)
    with steering_rows(model, rows):
        together = generate(model, inputs, max_new_tokens=8)[:, -8:]
    contexts = [
        SteeringVector({2: vector[0]}).apply(model),
        apply_activation_additions(model, tokenizer, additions, location),
        nullcontext(),
    ]
    for prompt, context, ids in zip(prompts, contexts, together, strict=True):
        with context:
            assert torch.equal(
                generate(model, encode(tokenizer, [prompt]), max_new_tokens=8)[0, -8:], ids
            )


def test_unsteered_rows_are_untouched_to_the_last_bit(model, tokenizer):
    inputs = batch_of(tokenizer, [7, 7])
    before = logits(model, inputs)
    for location in (None, *LOCATIONS):
        with steering_rows(
            model, [RowSteering(Site(0, "resid_post"), noise(model, 1, 0), location), None]
        ):
            after = logits(model, inputs)
        assert torch.equal(after[1], before[1]) and not torch.allclose(
            after[0], before[0], atol=0.1
        )


def test_a_prompt_shorter_than_its_own_addition_is_refused(model, tokenizer):
    """The prompt of another row may be shorter than an addition that is not meant for it."""
    inputs, before = batch_of(tokenizer, [8, 2]), snapshot(model)
    for location in LOCATIONS:
        long = RowSteering(Site(3, "resid_pre"), noise(model, 5, 0), location)
        with steering_rows(model, [long, None]):
            logits(model, inputs)
        for call in (
            lambda: logits(model, inputs),
            lambda: generate(model, inputs, max_new_tokens=2),
        ):
            with (
                pytest.raises(ValueError, match="the addition has 5 tokens and a prompt only 2"),
                steering_rows(model, [None, long]),
            ):
                call()
        with pytest.raises(ValueError, match="the addition has 5 tokens and a prompt only 2"):
            prefilled_cache(model, inputs, [None, long])
    assert_pristine(model, before)


def test_a_layer_that_is_not_there_is_refused(model):
    before = snapshot(model)
    rows = [
        RowSteering(Site(0, "resid_post"), noise(model, 1, 0)),
        RowSteering(Site(6, "resid_pre"), noise(model, 1, 0), "front"),
    ]
    with pytest.raises(ValueError, match="blocks 0 to 5"), steering_rows(model, rows):
        pass
    assert_pristine(model, before)


@given(batches())
def test_deltas_are_what_the_steering_adds(model, tokenizer, drawn):
    """`row_deltas` says what the hooks of `steering_rows` add, at every real token."""
    lengths, rows = drawn
    rows = [row or RowSteering(Site(0, "resid_post"), torch.zeros(1, D_MODEL)) for row in rows]
    inputs = batch_of(tokenizer, lengths)
    at_one_place = [row._replace(site=Site(2, "resid_post")) for row in rows]
    found = []
    handle = model.transformer.h[2].register_forward_hook(
        lambda module, args, output: found.append(get_hidden(output))
    )
    try:
        logits(model, inputs)
        with steering_rows(model, at_one_place):
            logits(model, inputs)
    finally:
        handle.remove()
    before, after = found
    real = inputs["attention_mask"].bool()
    assert torch.allclose(
        (after - before)[real],
        row_deltas(at_one_place, before, inputs).expand_as(before)[real],
        atol=1e-5,
    )


def test_vectors_take_the_dtype_of_the_hidden_states(model, tokenizer):
    """In bf16 the vectors of a float32 sweep are added in bf16, as in `SteeringVector.apply`."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs, vector = batch_of(tokenizer, [7, 4]), noise(model, 1, 0)
    rows = [RowSteering(Site(2, "resid_post"), vector), None]
    with SteeringVector({2: vector[0]}).apply(half):
        expected = logits(half, inputs)[0]
    with steering_rows(half, rows):
        assert torch.equal(logits(half, inputs)[0], expected)
    check_generation(half, inputs, rows)


# --- passes that start after a block ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_from_a_block_on_is_a_plain_steered_pass(name, tokenizer):
    """At every layer of a padded batch: logits of all positions, of the last one, and texts."""
    other = tiny_model(name, len(tokenizer))
    inputs = batch_of(tokenizer, [9, 3, 6])
    real, before = inputs["attention_mask"].bool(), snapshot(other)
    outputs, plain = record_blocks(other, inputs, range(LAYERS))
    assert torch.equal(plain, logits(other, inputs)) and list(outputs) == list(range(LAYERS))
    for layer in range(LAYERS):
        vector = noise(other, 1, layer) * 4
        with SteeringVector({layer: vector[0]}).apply(other):
            expected = logits(other, inputs)
        hidden = get_hidden(outputs[layer]) + vector
        found = logits_from(other, inputs, layer, outputs[layer], hidden)
        assert torch.allclose(found[real], expected[real], atol=1e-4) and not torch.allclose(
            found[real], plain[real], atol=0.1
        )
        last = logits_from(other, inputs, layer, outputs[layer], hidden, keep=1)
        assert last.shape[1] == 1 and torch.allclose(last, expected[:, -1:], atol=1e-4)
    rows = [
        RowSteering(Site(2, "resid_post"), noise(other, 1, 0) * 4),
        RowSteering(Site(0, "resid_pre"), noise(other, 2, 1) * 4, "back"),
        None,
    ]
    check_generation(other, inputs, rows, shared=name != "Mistral")
    assert_pristine(other, before)


def check_generation(model, inputs, rows, shared: bool = True) -> None:
    """Generation from a filled cache gives what plain steered generation gives."""
    cache = prefilled_cache(model, inputs, rows)
    assert (cache is not None) == shared
    with steering_rows(model, rows):
        assert torch.equal(
            generate(model, inputs, max_new_tokens=NEW, past_key_values=cache),
            generate(model, inputs, max_new_tokens=NEW),
        )


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_blocks_below_do_not_run(model, tokenizer, layer):
    inputs, ran = batch_of(tokenizer, [5, 5]), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(model.transformer.h)
    ]
    try:
        outputs = record_blocks(model, inputs, [layer]).outputs
        ran.clear()
        logits_from(model, inputs, layer, outputs[layer], get_hidden(outputs[layer]))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(layer + 1, 6))


class Broken(Exception):
    """What a test throws into a pass."""


@contextmanager
def breaking(block):
    """A block that throws."""

    def throw(*args, **kwargs):
        raise Broken

    handle = block.mlp.register_forward_hook(throw)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("broken", [0, 2, 4, 5])
def test_the_model_is_restored_after_an_exception(model, tokenizer, broken):
    """Wherever in the pass it comes; vectors everywhere and in spans, at both ends of the model."""
    inputs, before = batch_of(tokenizer, [5, 7, 7]), snapshot(model)
    rows = [
        RowSteering(Site(3, "resid_post"), noise(model, 1, 0)),
        RowSteering(Site(0, "resid_pre"), noise(model, 2, 1), "mid"),
        RowSteering(Site(3, "resid_pre"), noise(model, 2, 1), "back"),
    ]
    outputs = record_blocks(model, inputs, [3]).outputs
    with breaking(model.transformer.h[broken]):
        inside = snapshot(model)
        for call in (
            lambda: record_blocks(model, inputs, [1, 2]),
            lambda: prefilled_cache(model, inputs, rows),
            lambda: (
                logits_from(model, inputs, 3, outputs[3], get_hidden(outputs[3]))
                if broken > 3
                else logits(model, inputs)
            ),
        ):
            with pytest.raises(Broken):
                call()
            assert_pristine(model, inside)
        with pytest.raises(Broken), steering_rows(model, rows):
            logits(model, inputs)
    assert_pristine(model, before)
    assert not any("forward" in vars(block) for block in model.transformer.h)


def test_a_forward_that_someone_set_is_given_back(model, tokenizer):
    """Accelerate puts a `forward` on the blocks themselves."""
    other = copy_sharing_weights(model)
    for block in other.transformer.h:
        add_hook_to_module(block, ModelHook())
    mine = [vars(block)["forward"] for block in other.transformer.h]
    inputs, rows = (
        batch_of(tokenizer, [5, 7]),
        [RowSteering(Site(3, "resid_post"), noise(model, 1, 0)), None],
    )
    check_generation(other, inputs, rows)
    with pytest.raises(Broken), breaking(other.transformer.h[5]):
        prefilled_cache(other, inputs, rows)
    assert all(
        vars(block)["forward"] is forward
        for block, forward in zip(other.transformer.h, mine, strict=True)
    )


# --- generation from a cache that is filled ---


@given(batches(shortest=2))
def test_generation_from_a_filled_cache_is_plain_generation(model, tokenizer, drawn):
    """Every row the same tokens as alone: at any layer, at what block 0 reads, with padding."""
    lengths, rows = drawn
    inputs = batch_of(tokenizer, lengths)
    cache = prefilled_cache(model, inputs, rows)
    with steering_rows(model, rows):
        together = generate(
            model, inputs, max_new_tokens=NEW, past_key_values=cache, eos_token_id=None
        )
    for number, row in enumerate(rows):
        with steered_alone(model, row):
            alone = generate(
                model, row_alone(inputs, number), max_new_tokens=NEW, eos_token_id=None
            )
        assert torch.equal(together[number, -NEW:], alone[0, -NEW:])


def test_a_prompt_of_one_token_beside_longer_ones(model, tokenizer):
    """All it has in the cache is padding."""
    check_generation(
        model,
        batch_of(tokenizer, [1, 6]),
        [RowSteering(Site(1, "resid_post"), noise(model, 1, 0))] * 2,
    )


def test_the_filled_cache_holds_the_prompts(model, tokenizer):
    """All tokens but the last: keys and values as a plain steered pass leaves them."""
    inputs = batch_of(tokenizer, [8, 8])
    rows = [RowSteering(Site(3, "resid_post"), noise(model, 1, 0)), None]
    cache, own = prefilled_cache(model, inputs, rows), DynamicCache(config=model.config)
    with steering_rows(model, rows), torch.no_grad():
        model(inputs["input_ids"][:, :-1], past_key_values=own, use_cache=True)
    for found, expected in zip(cache.layers, own.layers, strict=True):
        assert found.get_seq_length() == 7
        for mine, theirs in ((found.keys, expected.keys), (found.values, expected.values)):
            assert torch.allclose(mine, theirs, atol=1e-4)


def test_what_is_below_is_computed_once_for_each_prompt(model, tokenizer):
    """Block 0 sees each distinct prompt once; the block after the steered one sees every row."""
    one, two = (batch_of(tokenizer, [6, 6])["input_ids"][row] for row in (0, 1))
    ids = torch.stack([one, two, one, one])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = [RowSteering(Site(2, "resid_post"), noise(model, 1, seed)) for seed in range(4)]
    seen = {0: [], 3: []}
    handles = [
        model.transformer.h[layer].mlp.register_forward_hook(
            lambda module, args, output, layer=layer: seen[layer].append(len(output))
        )
        for layer in seen
    ]
    try:
        prefilled_cache(model, inputs, rows)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {0: [2], 3: [2, 4]}


def test_where_there_is_nothing_to_share_there_is_no_cache(model, tokenizer):
    """Prompts of one token; sliding windows."""
    rows = [RowSteering(Site(1, "resid_post"), noise(model, 1, 0)), None]
    check_generation(model, batch_of(tokenizer, [1, 1]), rows, shared=False)


# --- sliding windows, and top_p ---


def test_nothing_is_shared_where_windows_slide(tokenizer):
    """A Mistral whose window is shorter than the text."""
    config = tiny_config("Mistral", len(tokenizer))
    config.sliding_window = 4
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(config).eval()
    rows = [RowSteering(Site(1, "resid_post"), noise(other, 1, 0)), None]
    check_generation(other, batch_of(tokenizer, [9, 9]), rows, shared=False)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from((1, 2, 7, 31, 32, 33, 400)),
    top_p=st.floats(0.01, 0.99),
    spread=st.sampled_from((0.1, 1.0, 3.0, 9.0)),
    seed=st.integers(0, 999),
    cut=st.floats(0, 0.9),
)
def test_top_p_is_that_of_transformers(rows, vocab, top_p, spread, seed, cut):
    """The same tokens stay, unless the sum meets top_p to the last bits."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(rows, vocab, generator=generator)
    out = torch.rand(rows, vocab, generator=generator) < cut
    out[:, seed % vocab] = False
    scores[out] = -torch.inf
    given = scores.clone()
    found, expected = TopP(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(scores, given)
    probs = given.softmax(-1).double()
    before = torch.where(probs[:, None] > probs[..., None], probs[:, None], 0.0).sum(
        -1
    )  # of all likelier tokens
    tied = ((probs[:, None] - probs[..., None]).abs() < 1e-9).sum(-1) > 1
    clear = ((before - top_p).abs() > 1e-5) & ~tied
    assert torch.equal(found[clear], expected[clear])
    kept = found > -torch.inf
    assert torch.equal(found[kept], given[kept]) and kept.any(-1).all()


def test_equally_likely_tokens_stay_together():
    """Of a tie, transformers keeps some; here all stay."""
    assert TopP(0.5)(None, torch.zeros(1, 50)).tolist() == torch.zeros(1, 50).tolist()


def test_a_row_without_numbers_does_not_stop_the_others():
    """A coefficient too large for float16 ends in nan; the rows beside it are sampled as ever."""
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    alone = TopP(0.5)(None, scores[1:])
    scores[0] = torch.nan
    assert torch.equal(TopP(0.5)(None, scores)[1:], alone)
