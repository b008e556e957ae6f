"""Steering falls on the same tokens however a text is generated, or is refused by name."""

import copy
import inspect
import threading
from contextlib import AbstractContextManager

import pytest
import torch
from architectures import RECURRENT, tiny_model
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    TextIteratorStreamer,
    pipeline,
)

from common.checking.pristine import assert_pristine, differences, snapshot
from common.loading import copy_sharing_weights
from common.passes import hooks as hooking
from common.passes.hooks import unsteered
from common.passes.padding import encode
from common.places.positions import PositionTracker, TokenSelection
from common.places.sites import Site
from common.texts.completions import complete
from common.texts.generation import text_logits
from common.texts.sampling import Sampling
from common.vectors.activation_additions import adding_spans
from common.vectors.reading import record_activations
from common.vectors.steering_vector import SteeringVector

TEXTS = [
    "My sister asked me about the baker and the tailor. I think dogs are",
    "My neighbour went",
    "I think dogs are",
]
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
PLACES = {
    "everywhere": {},
    "from the last but one": {"min_token_index": -2},
    "the last": {"token_indices": [-1]},
    "all but the last": {"token_indices": slice(0, -1)},
    "the first and the fifth": {"token_indices": [0, 4]},
    "from the fourth": {"min_token_index": 3},
    "front": "front",
    "mid": "mid",
    "back": "back",
}


def direction(d_model: int, rows: int = 1, size: float = 120.0) -> Tensor:
    """Random rows, about three times as long as the hidden states: the text has to change."""
    numbers = torch.randn(rows, d_model, generator=torch.Generator().manual_seed(1))
    return size * numbers / numbers.norm(dim=-1, keepdim=True)


def steering(model, place: str) -> AbstractContextManager:
    """A vector at some positions, or two vectors that are added to two tokens."""
    d_model, where = model.config.hidden_size, PLACES[place]
    if isinstance(where, str):
        return adding_spans(model, {(Site(1, "resid_post"), 2): direction(d_model, 2)}, where)
    return SteeringVector({1: direction(d_model)[0]}).apply(model, **where)


def assert_same_text(model, inputs, place: str, **options) -> None:
    """The text is that of plain generation under the same steering.

    It is not the unsteered one.
    """
    with steering(model, place):
        wanted, found = (
            model.generate(**inputs, **OPTIONS),
            model.generate(**inputs, **OPTIONS, **options),
        )
    assert torch.equal(found, wanted)
    assert not torch.equal(wanted, model.generate(**inputs, **OPTIONS))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [1, 5, 50])
def test_chunked_prefill(model, tokenizer, place, size):
    """The prompts of a padded batch, cut into chunks; some chunks are all padding."""
    assert_same_text(model, encode(tokenizer, TEXTS), place, prefill_chunk_size=size)


@pytest.mark.parametrize("place", PLACES)
def test_other_ways_to_generate(model, tokenizer, place):
    """Guesses behind the prompt; a static cache, in chunks; no cache."""
    one, batch = encode(tokenizer, TEXTS[:1]), encode(tokenizer, TEXTS)
    assert_same_text(model, one, place, prompt_lookup_num_tokens=4)
    assert_same_text(
        model,
        batch,
        place,
        cache_implementation="static",
        disable_compile=True,
        prefill_chunk_size=2,
    )
    assert_same_text(model, batch, place, use_cache=False)


@pytest.mark.parametrize("place", ["the last", "from the last but one", "mid"])
def test_drafts(tokenizer, place):
    """Of another model.

    Of a model's own first layers, whose `generate` is called within its `generate`.
    """
    llama, one = tiny_model("Llama", len(tokenizer)), encode(tokenizer, TEXTS[:1])
    assert_same_text(llama, one, place, assistant_early_exit=2)
    assert_same_text(llama, one, place, assistant_model=copy_sharing_weights(llama))


def test_drafts_are_steered_like_their_text(tokenizer):
    """Drafts of all layers are the text itself, so each is taken.

    It takes as few passes as without steering.
    """
    llama, one, passes = tiny_model("Llama", len(tokenizer)), encode(tokenizer, TEXTS[:1]), []
    options = {
        **OPTIONS,
        "max_new_tokens": 12,
        "assistant_early_exit": 4,
        "assistant_confidence_threshold": 0.0,
    }
    for multiplier in (1.0, 0.0):
        vector = SteeringVector({1: direction(32)[0]})
        with (
            vector.apply(llama, token_indices=[-1], multiplier=multiplier),
            record_activations(llama) as records,
        ):
            llama.generate(**one, **options)
        passes.append([hidden.shape[1] for hidden in records[0]])
    assert passes[0] == passes[1]


@pytest.mark.parametrize("place", ["the last", "mid"])
@pytest.mark.parametrize(
    "several",
    [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True}],
)
def test_several_sequences_of_each_prompt(model, tokenizer, place, several):
    """Beams and samples of one prompt have its length."""
    inputs, found = encode(tokenizer, TEXTS), []
    for options in ({}, {"prefill_chunk_size": 2}, {"use_cache": False}):
        torch.manual_seed(0)
        with steering(model, place):
            found.append(model.generate(**inputs, **OPTIONS | several | options))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("place", ["the last", "from the fourth", "front"])
def test_prompts_without_mask_and_as_embeddings(model, tokenizer, place):
    """Where no mask is given transformers finds the padding, and that counts.

    Embeddings are a prompt as well.
    """
    inputs = encode(tokenizer, TEXTS)
    ids, padding = inputs["input_ids"], inputs["input_ids"].ne(model.generation_config.pad_token_id)
    chunks, embeddings = {"prefill_chunk_size": 2}, model.transformer.wte(ids)
    with steering(model, place):
        wanted = model.generate(ids, attention_mask=padding.long(), **OPTIONS)
        assert torch.equal(model.generate(ids, **OPTIONS, **chunks), wanted)
        assert torch.equal(model.generate(inputs=ids, **OPTIONS, **chunks), wanted)
        wanted = model.generate(**inputs, **OPTIONS)[:, ids.shape[1] :]
        mask = inputs["attention_mask"]
        assert torch.equal(
            model.generate(inputs_embeds=embeddings, attention_mask=mask, **OPTIONS), wanted
        )
        wanted = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **OPTIONS)[
            :, ids.shape[1] :
        ]
        assert torch.equal(model.generate(inputs_embeds=embeddings[:1], **OPTIONS), wanted)


@pytest.mark.parametrize("place", ["from the last but one", "the last", "from the fourth"])
def test_a_cache_that_holds_part_of_the_prompt(model, tokenizer, place):
    """The prompt is all that `generate` is given or its mask spans, wherever the cache ends.

    Chunks or not.
    """
    inputs = encode(tokenizer, TEXTS[:1])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        prefix = model(
            ids[:, :3], use_cache=True
        ).past_key_values  # none of these tokens is steered in the end
    with steering(model, place):
        wanted = model.generate(**inputs, **OPTIONS)
        for options in ({}, {"prefill_chunk_size": 2}):
            whole = model.generate(
                **inputs, **OPTIONS, past_key_values=copy.deepcopy(prefix), **options
            )
            assert torch.equal(whole, wanted)
        new = model.generate(
            ids[:, 3:], attention_mask=mask, past_key_values=copy.deepcopy(prefix), **OPTIONS
        )
        assert torch.equal(new, wanted[:, 3:])


class _ReadsSomethingElse(LogitsProcessor):
    """Runs the model on another text while it generates."""

    def __init__(self, model, ids: Tensor):
        self.model, self.ids, self.found = model, ids, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = self.model(self.ids[:, :4], use_cache=True)
        second = self.model(self.ids[:, 4:], past_key_values=first.past_key_values)
        self.found.append(torch.cat([first.logits, second.logits], 1))
        return scores


def test_other_texts_while_generating(model, tokenizer):
    """A pass with a cache of its own reads another text, whose prompt has another end."""
    inputs = encode(tokenizer, TEXTS)
    other = _ReadsSomethingElse(model, encode(tokenizer, TEXTS[:1])["input_ids"][:, :7])
    with steering(model, "from the last but one"):
        wanted, by_hand = model.generate(**inputs, **OPTIONS), other(None, None)
        assert torch.equal(model.generate(**inputs, **OPTIONS, logits_processor=[other]), wanted)
        assert all(torch.equal(found, other.found[0]) for found in other.found)
        guided = [
            model.generate(**inputs, **OPTIONS, guidance_scale=1.5, **more)
            for more in ({}, {"prefill_chunk_size": 2})
        ]
        assert torch.equal(*guided) and not torch.equal(guided[0], wanted)
        unguided = {"guidance_scale": 1.0, "use_cache": False}  # it reads one text
        assert torch.equal(model.generate(**inputs, **OPTIONS, **unguided), wanted)
        with pytest.raises(
            ValueError, match="guidance_scale=1.5 reads two texts in turn.*use_cache=True"
        ):
            model.generate(**inputs, **OPTIONS, guidance_scale=1.5, use_cache=False)
    assert by_hand is None


def test_streams_and_pipelines(model, tokenizer):
    """Both call `generate` of the model, one of them in a thread."""
    inputs = encode(tokenizer, TEXTS[:1])
    with steering(model, "the last"):
        wanted = tokenizer.decode(
            model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {**inputs, **OPTIONS, "prefill_chunk_size": 2}
        thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == wanted
        thread.join()
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        (written,) = writer(
            tokenizer.bos_token + TEXTS[0], **OPTIONS, prefill_chunk_size=2, return_full_text=False
        )
        assert written["generated_text"] == wanted


SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, use_cuda_graph=False)


def continuously(model, prompts: list[list[int]]) -> list[list[int]]:
    """Generate by continuous batching, with as little memory as it takes."""
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(prompts, settings, continuous_batching_config=SMALL, warmup=False)
    return [request.generated_tokens for request in found.values()]


def test_continuous_batching(tokenizer):
    """Packed into one row, tokens from the front are found.

    Those from the end are refused before anything runs.
    """
    model = tiny_model("Llama", len(tokenizer))
    prompts = tokenizer(TEXTS)["input_ids"]
    with steering(model, "from the fourth"):
        wanted = [
            model.generate(torch.tensor([ids]), **OPTIONS)[0, len(ids) : len(ids) + 4].tolist()
            for ids in prompts
        ]
        assert continuously(model, prompts) == wanted
    before = snapshot(model)
    with (
        model.continuous_batching_context_manager(
            warmup=False, continuous_batching_config=SMALL
        ) as running,
        steering(model, "the last"),
    ):
        running.add_request(prompts[0], max_new_tokens=2)
        assert "several texts share one row" in running.get_result(timeout=60).error
    rows = SteeringVector({1: direction(32)[0]}).apply(
        model, token_indices=torch.tensor([[1, 0], [0, 1], [1, 1]])
    )
    for refused in (*(steering(model, place) for place in ("the last", "front", "back")), rows):
        with (
            refused,
            record_activations(model) as passes,
            pytest.raises(ValueError, match="several texts share one row"),
        ):
            continuously(model, prompts)
        assert not passes
    assert_pristine(model, before)


@pytest.fixture(params=RECURRENT)
def recurrent(request, tokenizer):
    return tiny_model(request.param, len(tokenizer))


@pytest.mark.parametrize(
    "place", ["the last", "the first and the fifth", "from the fourth", "front", "mid"]
)
def test_recurrent_models(recurrent, tokenizer, place):
    """Hidden states with the state are those without it, in generation and when read again."""
    # RWKV and RecurrentGemma read padding like text, so a row of their batches is not what it is
    # alone.
    inputs = encode(
        tokenizer, TEXTS[: 1 if recurrent.config.model_type in ("rwkv", "recurrent_gemma") else 3]
    )
    found = []
    with steering(recurrent, place):
        for use_cache in (True, False):
            with record_activations(recurrent, layer_nums=[1]) as records:
                ids = recurrent.generate(**inputs, **OPTIONS, use_cache=use_cache)
            found.append(torch.cat(records[1], 1) if use_cache else records[1][-1])
        with record_activations(recurrent, layer_nums=[1]) as records:
            text_logits(recurrent, inputs, ids[:, :-1])
    found.append(records[1][0])
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1).bool()
    cached, *others = (hidden[real] for hidden in found)
    for other in others:
        torch.testing.assert_close(cached, other, atol=1e-3, rtol=1e-3)
    with record_activations(recurrent, layer_nums=[1]) as records:
        recurrent.generate(**inputs, **OPTIONS)
    assert not torch.allclose(torch.cat(records[1], 1)[real], cached, atol=1e-2)


def test_completions_of_recurrent_models(recurrent, tokenizer):
    """Sampled and measured under additions, which count in the prompt."""
    frame = complete(
        recurrent,
        tokenizer,
        TEXTS[:1] * 2,
        steering(recurrent, "back"),
        seed=0,
        sampling=Sampling(max_new_tokens=3),
    )
    assert frame["loss"].notna().all() and (frame["loss"] != frame["unsteered_loss"]).all()


def by_hand(model, ids: Tensor, cuts: list[int], cache: str) -> Tensor:
    """The logits of passes by hand, each with what the one before left."""
    parts, given = [], {}
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        out = model(ids[:, start:end], use_cache=True, **given)
        parts.append(out.logits)
        given = {cache: getattr(out, cache)}
    return torch.cat(parts, 1)


@torch.no_grad()
def test_recurrent_models_by_hand(tokenizer):
    """A state that was filled under steering is counted.

    One that nobody counted is refused by name.
    """
    ids, vector = (
        encode(tokenizer, TEXTS[:1])["input_ids"][:, :8],
        SteeringVector({1: direction(32)[0]}),
    )
    for name in ("Mamba", "Mamba-2"):
        model = tiny_model(name, len(tokenizer))
        for where, absolute in (([-1], [4]), ([1, 6], [1, 6])):
            with vector.apply(model, token_indices=where):
                passes = by_hand(model, ids, [5, 6, 7], "cache_params")
            with vector.apply(model, token_indices=absolute):
                torch.testing.assert_close(
                    model(ids, use_cache=False).logits, passes, atol=1e-3, rtol=1e-3
                )
        filled = model(ids, use_cache=True).cache_params
        with (
            vector.apply(model, min_token_index=1),
            pytest.raises(ValueError, match="MambaModel|Mamba2Model.*does not say how many"),
        ):
            model(ids[:, -1:], cache_params=filled)
        with (
            vector.apply(model, min_token_index=1),
            pytest.raises(ValueError, match="does not say how many tokens it holds"),
        ):
            model.generate(ids, cache_params=filled, **OPTIONS)
    model = tiny_model("RWKV", len(tokenizer))
    with (
        vector.apply(model, token_indices=[0]),
        pytest.raises(ValueError, match="RwkvModel was given a cache that does not say"),
    ):
        by_hand(model, ids, [5], "state")
    with vector.apply(model):
        torch.testing.assert_close(
            by_hand(model, ids, [5, 6, 7], "state"),
            model(ids, use_cache=False).logits,
            atol=1e-3,
            rtol=1e-3,
        )


# --- passes by hand ---


@torch.no_grad()
def test_a_longer_text_without_a_cache_is_a_prompt_of_its_own(model, tokenizer):
    """Not a continuation, though it begins with the prompt before; in `generate` it is one."""
    ids = encode(tokenizer, TEXTS[:1])["input_ids"]
    with steering(model, "the last"):
        after = [model(ids[:, :length], use_cache=False).logits for length in (6, 7, 8)]
    for length, logits in zip((6, 7, 8), after):
        with steering(model, "the last"):
            assert torch.equal(model(ids[:, :length], use_cache=False).logits, logits)


@torch.no_grad()
def test_each_cache_is_a_text_of_its_own(model, tokenizer):
    """Two texts read in turn, a deep copy of a cache, a cache that is used again.

    Each goes on where it ended.
    """
    texts = [encode(tokenizer, [text])["input_ids"] for text in TEXTS[:2]]
    with steering(model, "the last"):
        first = [model(ids[:, :3], use_cache=True) for ids in texts]
        twins = [copy.deepcopy(out.past_key_values) for out in first]
        rest = [
            model(ids[:, 3:4], past_key_values=out.past_key_values).logits
            for ids, out in zip(texts, first)
        ]
        again = [model(ids[:, 3:4], past_key_values=twin).logits for ids, twin in zip(texts, twins)]
    for ids, out, *logits in zip(texts, first, rest, again):
        with SteeringVector({1: direction(model.config.hidden_size)[0]}).apply(
            model, token_indices=[2]
        ):
            whole = model(ids[:, :4]).logits
        torch.testing.assert_close(
            torch.cat([out.logits, logits[0]], 1), whole, atol=1e-4, rtol=1e-4
        )
        assert torch.equal(*logits)


@torch.no_grad()
def test_a_text_that_begins_unsteered(model, tokenizer):
    """What was read while steering was suspended is no prompt.

    The text begins with the pass that is steered.
    """
    ids = encode(tokenizer, TEXTS[:1])["input_ids"]
    with steering(model, "the last"):
        model(ids[:, :2])
        with unsteered():
            cache = model(ids[:, :6], use_cache=True).past_key_values
        found = model(ids[:, 6:7], past_key_values=cache).logits
    with SteeringVector({1: direction(model.config.hidden_size)[0]}).apply(
        model, token_indices=[6]
    ):
        torch.testing.assert_close(found, model(ids[:, :7]).logits[:, 6:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_that_was_repeated(model, tokenizer):
    """Prompts of one length have it in every row.

    Of different lengths it is not known whose a row is.
    """
    inputs = encode(tokenizer, TEXTS[:1] * 2)
    batch, new = encode(tokenizer, TEXTS), torch.tensor([[5]])
    with steering(model, "from the last but one"):
        cache = model(**inputs, use_cache=True).past_key_values
        wanted = model(new.expand(2, -1), past_key_values=copy.deepcopy(cache)).logits[:1]
        cache.batch_repeat_interleave(2)
        torch.testing.assert_close(
            model(new.expand(4, -1), past_key_values=cache).logits, wanted.expand(4, -1, -1)
        )
        cache = model(**batch, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(
            ValueError, match="filled with 3 prompts of different lengths, and the pass has 6 rows"
        ):
            model(new.expand(6, -1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_that_was_cut_begins_anew(model, tokenizer):
    """Cut within its prompt, a cache holds the beginning of another one.

    Cut behind it, the prompt is the same.
    """
    ids = encode(tokenizer, TEXTS[:1])["input_ids"]
    with steering(model, "the last"):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        model(ids[:, 6:9], past_key_values=cache)
        cache.crop(-1)
        behind = model(ids[:, 8:9], past_key_values=cache).logits
        cache.crop(-6)
        anew = model(ids[:, 3:5], past_key_values=cache).logits
    vector = SteeringVector({1: direction(model.config.hidden_size)[0]})
    with vector.apply(model, token_indices=[5]):
        torch.testing.assert_close(behind, model(ids[:, :9]).logits[:, 8:], atol=1e-4, rtol=1e-4)
    with vector.apply(model, token_indices=[4]):
        torch.testing.assert_close(anew, model(ids[:, :5]).logits[:, 3:], atol=1e-4, rtol=1e-4)


# --- threads ---


@pytest.mark.parametrize("place", ["the last", "from the fourth", "mid"])
def test_threads_have_each_their_own_passes(model, tokenizer, place):
    """Under one steering threads read texts of different lengths, and meet in the steered block."""
    inputs, found = [encode(tokenizer, [text]) for text in TEXTS[:2]], [[], []]
    together = threading.Barrier(2, timeout=30)

    def meet(*_) -> None:
        together.wait()

    with steering(model, place), torch.no_grad():
        wanted = [model(**each).logits for each in inputs]
        meeting = model.transformer.h[1].register_forward_pre_hook(meet)

        def read(number: int) -> None:
            try:
                with torch.no_grad():
                    found[number] += [model(**inputs[number]).logits for _ in range(3)]
            finally:
                together.abort() if len(found[number]) < 3 else None

        threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            meeting.remove()
    for number in range(2):
        assert len(found[number]) == 3 and all(
            torch.equal(each, wanted[number]) for each in found[number]
        )


# --- the model, restored ---


def test_generate_is_put_back(model, tokenizer):
    """In whatever order blocks close, and after an exception.

    Meanwhile the check for leftovers sees what stands there.
    """
    before, vector = snapshot(model), SteeringVector({1: direction(model.config.hidden_size)[0]})
    handles = [vector.patch(model, token_indices=[-index]) for index in (1, 2, 3)]
    assert (
        "module the model itself was added, removed, replaced or given another method or mode"
        in differences(model, before)
    )
    assert inspect.signature(model.generate) == inspect.signature(
        type(model).generate.__get__(model)
    )
    for handle in (handles[1], handles[0], handles[1]):
        handle.remove()
    inputs = encode(tokenizer, TEXTS)
    still = model.generate(**inputs, **OPTIONS, prefill_chunk_size=1)
    handles[2].remove()
    assert_pristine(model, before)
    with vector.apply(model, token_indices=[-3]):
        assert torch.equal(model.generate(**inputs, **OPTIONS), still)
    for place in ("the last", "back", "from the fourth"):

        def fails(place=place):
            with steering(model, place):
                model.generate(**encode(tokenizer, TEXTS), max_new_tokens=1)
                raise ValueError("boom")

        with pytest.raises(ValueError, match="boom"):
            fails()
    assert_pristine(model, before)
    with vector.apply(model):
        assert vars(model).keys() == vars(
            copy_sharing_weights(model)
        ).keys() and "generate" not in vars(model)


def test_a_model_that_cannot_be_watched_is_left_as_it_was(model, monkeypatch):
    """Whatever fails while the hooks are set."""
    before = snapshot(model)
    monkeypatch.setitem(hooking.WATCHED, "a method that it lacks", None)
    with pytest.raises(AttributeError, match="a method that it lacks"):
        hooking.hook_passes(model, PositionTracker(model.transformer, TokenSelection(-1)))
    assert_pristine(model, before)


def test_a_model_within_a_model_is_not_watched(model, tokenizer):
    """Its `generate` reads texts of its own, with other blocks."""
    own = copy_sharing_weights(model)
    own.drafter = tiny_model("Llama", len(tokenizer))
    with steering(own, "the last"):
        assert "generate" in vars(own) and "generate" not in vars(own.drafter)


def test_another_method_in_the_place_of_generate_stays(model, tokenizer):
    """What a user set on the model before is called, and is there again afterwards.

    What is set meanwhile stays.
    """
    own, calls = copy_sharing_weights(model), []
    own.generate = mine = lambda *args, **kwargs: (
        calls.append(1) or type(own).generate(own, *args, **kwargs)
    )
    assert_same_text(own, encode(tokenizer, TEXTS), "the last", prefill_chunk_size=2)
    assert own.generate is mine and len(calls) == 3
    with steering(own, "the last"):
        own.generate = other = lambda *args, **kwargs: None
    assert own.generate is other


def test_a_deep_copy_counts_for_itself(model, tokenizer):
    """It stays steered, at the same positions, and calls nothing of the original."""
    inputs = encode(tokenizer, TEXTS)
    with steering(model, "the last"):
        wanted, twin = model.generate(**inputs, **OPTIONS), copy.deepcopy(model)
    with record_activations(model) as passes:
        assert torch.equal(twin.generate(**inputs, **OPTIONS, prefill_chunk_size=2), wanted)
    assert not passes
