"""Whoever computes the units, in whatever order and however often it is lost: the same results."""

from contextlib import suppress
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from played import PlayedEngine
from safetensors.torch import save

from common import (
    ActivationAddition,
    Grid,
    RayEngine,
    Sampling,
    SteeringVector,
    SteeringVectorTrainingSample,
    ablation_then_addition_operator,
    extract_activations,
    logistic_aggregator,
    mean_aggregator,
    mean_centred_aggregator,
    pca_aggregator,
    perplexity_ratios,
    read_sweep,
    sweep,
    sweep_logits,
    sweep_perplexity,
    token_logprob,
    train_steering_vector,
)
from common.loading import copy_sharing_weights
from common.passes.rounding import is_rounding
from common.scaling.dispatch import LostRowsError
from common.vectors import pairs as pairs_module
from common.vectors.aggregators import moments_of

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the"]
TEXTS = ["The old library is on the hill.", "My neighbour is in the garden.", "I love you so much."]
TOPICS = {"on": "I love dogs. The dogs are charming. We see dogs.", "off": " ".join(TEXTS)}
PAIRS = [
    (f"I love {what} and {who}", f"I hate {what} and {who}")
    for what in ("dogs", "the garden", "you", "the old library")
    for who in ("you", "the captain", "my neighbour")
]
MEMORY = [1, 1_000_000, 2**30]  # three cuts


@pytest.fixture(scope="module")
def vector(model) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    shape = model.config.num_hidden_layers, model.config.hidden_size
    return SteeringVector(dict(enumerate(0.5 * torch.randn(shape, generator=generator))))


def grid(vector) -> Grid:
    additions = [ActivationAddition(1.0, 0, "Love")]
    return Grid({"v": vector, "a": additions}, [0, 4], [1.5], random_controls=1)


SAMPLING = Sampling(max_new_tokens=3, temperature=1.0, top_p=0.9)
SWEEPS = {
    "completions": lambda model, tokenizer, vector, **options: sweep(
        model,
        tokenizer,
        grid(vector),
        PROMPTS,
        {"words": lambda texts: [len(text.split()) for text in texts]},
        sampling=SAMPLING,
        per_prompt=2,
        **options,
    ),
    "logits": lambda model, tokenizer, vector, **options: sweep_logits(
        model, tokenizer, grid(vector), PROMPTS, {"p": token_logprob([5, 7])}, **options
    ),
    "perplexity": lambda model, tokenizer, vector, **options: sweep_perplexity(
        model, tokenizer, grid(vector), TEXTS, **options
    ),
}
ROWS = {"completions": 9 * 3 * 2, "logits": 9 * 3, "perplexity": 9 * 3}


@pytest.fixture(scope="module")
def expected(model, tokenizer, vector):
    """The frames of this process, by kind."""
    return {kind: run(model, tokenizer, vector) for kind, run in SWEEPS.items()}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", SWEEPS)
def test_a_sweep_is_the_same_for_any_number_of_workers(model, tokenizer, vector, kind, memory):
    """To the last bit, in whatever order the units are done, where the cut is the same."""
    expected = SWEEPS[kind](model, tokenizer, vector, max_memory=memory)
    assert len(expected) == ROWS[kind]
    for size in (1, 2, 3):
        engine = PlayedEngine(size, seed=size)
        found = SWEEPS[kind](model, tokenizer, vector, max_memory=memory, engine=engine)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 3),
    risk=st.sampled_from([0.1, 0.5]),
    late=st.booleans(),
    kind=st.sampled_from(sorted(SWEEPS)),
)
def test_a_sweep_is_the_same_whatever_dies(
    model, tokenizer, vector, expected, seed, size, risk, late, kind
):
    """Where a unit was halved, numbers are the same but for rounding."""
    engine = PlayedEngine(size, seed=seed, risk=risk, deaths=4, late=late)
    # Four deaths do not name a row: it takes two in halves, and three by itself.
    found = SWEEPS[kind](model, tokenizer, vector, max_memory=1_000_000, engine=engine)
    pd.testing.assert_frame_equal(found, expected[kind], rtol=1e-3, atol=1e-5)


@settings(max_examples=4)
@given(
    deadly=st.sets(st.integers(0, 26), min_size=1, max_size=2), kind=st.sampled_from(sorted(SWEEPS))
)
def test_a_row_that_kills_is_named_and_computed_once_it_can_be(
    model, tokenizer, vector, expected, tmp_path_factory, deadly, kind
):
    """All others are in the file; the same call computes what is missing, here or there."""
    path = tmp_path_factory.mktemp("deadly") / "a.sweep"
    options = {"path": path, "max_memory": 1_000_000}
    with pytest.raises(LostRowsError, match="killed") as error:
        SWEEPS[kind](model, tokenizer, vector, engine=PlayedEngine(deadly=deadly), **options)
    part = read_sweep(path)
    assert set(error.value.numbers) == deadly and len(part) == ROWS[kind] - len(deadly)
    found = SWEEPS[kind](model, tokenizer, vector, **options)
    pd.testing.assert_frame_equal(found, expected[kind], rtol=1e-3, atol=1e-5)
    for number in deadly:  # the message says which row it is
        row = expected[kind].iloc[number]
        where = (
            "" if row["kind"] == "unsteered" else f" at layer {row['layer']} times {row['coeff']:g}"
        )
        text = row["prompt"] if "prompt" in row else row["text"]
        assert f"{row['steering']!r}{where} on {text!r}" in str(error.value)


@pytest.mark.parametrize("kind", ["completions", "logits"])
def test_settings_of_a_grid_go_to_the_workers(model, tokenizer, vector, kind, monkeypatch):
    """An operator, a first token and a part of a block act there as they act here."""
    part = SteeringVector(vector.layer_activations, "mlp")
    frames = []
    for options in ({}, {"operator": ablation_then_addition_operator(), "min_token_index": 1}):
        settled = Grid({"v": vector, "part": part}, [0, 4], [1.5], **options)
        monkeypatch.setitem(globals(), "grid", lambda _, settled=settled: settled)
        expected = SWEEPS[kind](model, tokenizer, vector)
        found = SWEEPS[kind](model, tokenizer, vector, engine=PlayedEngine(2, seed=1))
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        frames.append(found)
    assert not frames[0].equals(frames[1])


def test_a_sweep_goes_on_here_or_there(model, tokenizer, vector, expected, tmp_path):
    """A file does not know who computed its rows."""
    path, whole = tmp_path / "a.sweep", expected["completions"]

    class Stopped(Exception):
        pass

    def failing(texts):
        if list(texts) != PROMPTS and len(read := [*reads, texts]) > 3:
            raise Stopped(read)
        reads.append(texts)
        return [len(text.split()) for text in texts]

    for engine in (PlayedEngine(3, seed=1), None):
        reads: list = []
        with suppress(Stopped):
            sweep(
                model,
                tokenizer,
                grid(vector),
                PROMPTS,
                {"words": failing},
                sampling=SAMPLING,
                per_prompt=2,
                path=path,
                max_memory=1_000_000,
                engine=engine,
            )
    assert 0 < len(read_sweep(path)) < len(whole)
    found = SWEEPS["completions"](
        model, tokenizer, vector, path=path, max_memory=1_000_000, engine=PlayedEngine(2)
    )
    pd.testing.assert_frame_equal(found, whole)


def test_the_mode_of_a_workers_model_does_not_matter(model, tokenizer, vector, expected):
    """Dropout is off there, as here."""

    class Training(PlayedEngine):
        def run(self, model, tokenizer, job, units, bar):
            work = job.on(copy_sharing_weights(model).train(), tokenizer)
            yield from ((unit, work(unit)) for unit in units)

    for kind, run in SWEEPS.items():
        found = run(model, tokenizer, vector, engine=Training())
        pd.testing.assert_frame_equal(found, expected[kind], check_exact=True)
    for call in (
        lambda **more: extract_activations(model, tokenizer, PAIRS[:2], [4], **more)[0][4],
        lambda **more: list(
            perplexity_ratios(model, tokenizer, {"t": TEXTS}, {"c": "I"}, bootstrap=0, **more).ratio
        ),
    ):
        torch.testing.assert_close(call(engine=Training()), call())


def test_an_engine_is_stopped_where_the_caller_stops(model, tokenizer, vector):
    """At once, while the exception is still looked at."""
    ended = []

    class Noting(PlayedEngine):
        def run(self, *given):
            try:
                yield from super().run(*given)
            finally:
                ended.append(True)

    def failing(texts):
        if list(texts) != PROMPTS:
            raise KeyError("a bug")
        return [0] * len(texts)

    with pytest.raises(KeyError) as error:
        sweep(model, tokenizer, grid(vector), PROMPTS, {"m": failing}, engine=Noting())
    assert ended, error


def test_what_goes_to_workers_is_small(model, tokenizer, vector):
    """Vectors and prompts, and never a model or what it computed here."""
    sizes = []

    class Weighing(PlayedEngine):
        def run(self, model, tokenizer, job, units, bar):
            import cloudpickle

            job.on(model, tokenizer)(units[0])
            sizes.append(len(cloudpickle.dumps(job)))
            return super().run(model, tokenizer, job, units, bar)

    for kind in SWEEPS.values():
        kind(model, tokenizer, vector, engine=Weighing())
    train_steering_vector(model, tokenizer, PAIRS, engine=Weighing())
    steered = {"v": lambda model: vector.apply(model)}
    perplexity_ratios(model, tokenizer, TOPICS, steered, engine=Weighing(), bootstrap=0)
    vectors = sum(acts.nbytes for acts in vector.layer_activations.values())
    assert max(sizes) < 10 * vectors < 100_000


# --- training ---


SUMMING = {
    "mean": mean_aggregator(),
    "pca": pca_aggregator(),
    "mean_centred": mean_centred_aggregator(),
}
AGGREGATORS = {
    **SUMMING,
    "logistic": logistic_aggregator(),
    "own": lambda positive, negative: (positive - negative).median(0).values,
}


@pytest.fixture
def small_units(monkeypatch):
    """Five pairs in a unit, so that there are three."""
    monkeypatch.setattr(pairs_module, "PAIRS", 5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_training_is_the_same_for_any_number_of_workers(model, tokenizer, small_units, name):
    """To the last bit; and but for rounding what this process gives."""
    options = {"layers": [1, 4], "aggregator": AGGREGATORS[name], "batch_size": 2}
    expected = train_steering_vector(model, tokenizer, PAIRS, **options)
    found = [
        train_steering_vector(
            model, tokenizer, PAIRS, engine=PlayedEngine(size, seed=size), **options
        )
        for size in (1, 2, 3)
    ]
    for one in found:
        assert one.metadata == expected.metadata
        for layer, vector in expected.layer_activations.items():
            own = one.layer_activations[layer]
            torch.testing.assert_close(own, vector, rtol=1e-3, atol=1e-4)
            assert torch.equal(own, found[0].layer_activations[layer])


@pytest.mark.parametrize("index", [-1, 1, lambda prompt: len(prompt) % 3])
def test_activations_are_the_same_for_any_number_of_workers(model, tokenizer, small_units, index):
    options = {"layers": [2], "read_token_index": index, "batch_size": 2}
    expected = extract_activations(model, tokenizer, PAIRS, **options)
    found = [
        extract_activations(model, tokenizer, PAIRS, engine=PlayedEngine(size), **options)
        for size in (1, 3)
    ]
    for one in found:
        for side in (0, 1):
            assert [acts.shape for acts in one[side][2]] == [
                acts.shape for acts in expected[side][2]
            ]
            torch.testing.assert_close(one[side][2], expected[side][2], rtol=1e-4, atol=1e-4)
            assert all(map(torch.equal, one[side][2], found[0][side][2]))


def test_parts_that_are_there_are_done(model, tokenizer, small_units, tmp_path):
    """The model reads nothing twice; other pairs, another layer or batch size is another part."""
    engine = PlayedEngine(2, parts=tmp_path / "parts")
    read, seen = pairs_module.PairReading.read, []

    def noting(self, model, tokenizer, samples, **options):
        seen.append(len(samples))
        return read(self, model, tokenizer, samples, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module.PairReading, "read", noting)
        options = {"layers": [1, 10 % 6], "aggregator": logistic_aggregator(), "engine": engine}
        first = train_steering_vector(model, tokenizer, PAIRS, **options)
        assert sorted(seen) == [2, 5, 5] and len(list((tmp_path / "parts").iterdir())) == 3
        again = train_steering_vector(model, tokenizer, PAIRS, **options)
        assert sum(seen) == len(PAIRS)
        train_steering_vector(model, tokenizer, PAIRS[:6], **options)  # the first five are there
        assert sum(seen) == len(PAIRS) + 1
        other = {"layer_config": {"decoder_block": "transformer.h.{num}.mlp"}}
        for change in (
            {"layers": [2]},
            {"batch_size": 2},
            {"prepend_bos": True},
            {"layer_type": "mlp"},
            other,
        ):
            before = sum(seen)
            train_steering_vector(model, tokenizer, PAIRS, **options | change)
            assert sum(seen) == before + len(PAIRS)
    plain = train_steering_vector(
        model, tokenizer, PAIRS, layers=[1, 4], aggregator=logistic_aggregator()
    )
    for layer in (1, 4):
        assert torch.equal(first.layer_activations[layer], again.layer_activations[layer])
        torch.testing.assert_close(
            first.layer_activations[layer], plain.layer_activations[layer], rtol=1e-3, atol=1e-4
        )


def test_a_part_that_could_not_be_written_is_not_there(
    model, tokenizer, small_units, tmp_path, monkeypatch
):
    """What was half written is not taken for a part by the next call."""
    options = {"layers": [1], "engine": PlayedEngine(parts=tmp_path)}

    def full(tensors):
        raise OSError("no space left")

    monkeypatch.setattr(pairs_module, "save", full)
    with pytest.raises(OSError, match="no space left"):
        extract_activations(model, tokenizer, PAIRS, **options)
    monkeypatch.setattr(pairs_module, "save", save)
    found = extract_activations(model, tokenizer, PAIRS, **options)
    expected = extract_activations(model, tokenizer, PAIRS, [1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_parts_of_a_tokenizer_that_reads_otherwise_are_not_taken(
    model, tokenizer, small_units, tmp_path
):
    """The same pairs are other tokens then; nothing else has changed."""
    other, pairs = deepcopy(tokenizer), [([message(one)], [message(two)]) for one, two in PAIRS]
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    other.chat_template = tokenizer.chat_template + " because they are charming"
    options = {"layers": [2], "aggregator": logistic_aggregator()}
    engine = PlayedEngine(2, parts=tmp_path)
    for reader in (tokenizer, other):
        expected = train_steering_vector(model, reader, pairs, **options)
        found = train_steering_vector(model, reader, pairs, engine=engine, **options)
        torch.testing.assert_close(
            found.layer_activations, expected.layer_activations, rtol=1e-3, atol=1e-4
        )


def message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_layers_and_indices_of_any_kind_are_the_same_parts(model, tokenizer, small_units, tmp_path):
    """Numbers of numpy, negative ones, a range: none is read twice."""
    ways = [([1, 5], -1), (np.array([1, 5]), np.int64(-1)), ((1, -1), -1), (range(1, 6, 4), -1)]
    for layers, index in ways:
        samples = [SteeringVectorTrainingSample(*pair, index, index) for pair in PAIRS]
        found = extract_activations(
            model, tokenizer, samples, layers, engine=PlayedEngine(parts=tmp_path)
        )
        expected = extract_activations(model, tokenizer, samples, layers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_line_without_a_side_is_the_same_vector_there(model, tokenizer, small_units):
    """Each pair both ways: the differences are 0 on average, and rounding must not decide."""
    both = PAIRS + [(two, one) for one, two in PAIRS]
    options = {"aggregator": pca_aggregator()}
    expected = train_steering_vector(model, tokenizer, both, **options).layer_activations
    for size in (1, 2):
        engine = PlayedEngine(size)
        found = train_steering_vector(model, tokenizer, both, engine=engine, **options)
        torch.testing.assert_close(found.layer_activations, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SUMMING)
def test_a_vector_of_rounding_is_refused_there_too(model, tokenizer, small_units, name):
    """Pairs of one prompt; and the same prompts on both sides, in another order."""
    turned = [one for one, _ in PAIRS[1:]] + [PAIRS[0][0]]
    for same in ([(one, one) for one, _ in PAIRS], list(zip([one for one, _ in PAIRS], turned))):
        for engine in (None, PlayedEngine()):
            if name == "pca" and same[0][0] != same[0][1]:
                continue  # it has a component
            with pytest.raises(
                ValueError, match=r"layer 2: the vector is (0|nothing but rounding)"
            ):
                train_steering_vector(
                    model, tokenizer, same, [2], aggregator=SUMMING[name], engine=engine
                )


whole = st.integers(-9, 9)


@given(
    st.lists(st.tuples(*[whole] * 6), min_size=1, max_size=12),
    st.lists(st.integers(1, 11), max_size=4),
    st.randoms(),
)
def test_sums_over_any_partition_are_the_sums_over_all(rows, cuts, chance):
    """Of whole numbers, so that no rounding hides what is lost."""
    acts = torch.tensor(rows, dtype=torch.float32)
    positive, negative = acts[:, :3], acts[:, 3:]
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    parts = [
        moments_of(positive[start:end], negative[start:end], True)
        for start, end in pairwise(bounds)
    ]
    chance.shuffle(parts)
    total, *others = parts
    for part in others:
        total = total.plus(part)
    expected = moments_of(positive, negative, True)
    assert torch.equal(total.gram, expected.gram)
    for one, other in zip(total.spread, expected.spread):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    vector = mean_aggregator()(positive, negative)
    torch.testing.assert_close(mean_aggregator().of_moments(total), vector)
    assert is_rounding(vector, total.spread) == is_rounding(vector, expected.spread)
    if (positive != negative).any():
        own, other = pca_aggregator().of_moments(total), pca_aggregator()(positive, negative)
        differences = (positive - negative).double()
        # Of two components that are as strong, either will do.
        assert (differences @ own.double()).norm() == pytest.approx(
            (differences @ other.double()).norm().item(), rel=1e-5
        )


# --- perplexity ---


def test_perplexity_is_the_same_for_any_number_of_workers(model, tokenizer, vector):
    """For texts in front, additions, and steering of the worker's own model."""
    conditions = {
        "prompted": "I love",
        "added": [ActivationAddition(3.0, 2, "Love")],
        "steered": lambda model: vector.apply(model, multiplier=0.2),
    }
    options = {"batch_size": 2, "bootstrap": 50}
    expected = perplexity_ratios(model, tokenizer, TOPICS, conditions, **options)
    assert expected["ratio"].nunique() == 6
    for size in (1, 2, 3):
        engine = PlayedEngine(size, seed=size)
        found = perplexity_ratios(model, tokenizer, TOPICS, conditions, engine=engine, **options)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    here = {**conditions, "steered": lambda: vector.apply(model, multiplier=0.2)}
    found = perplexity_ratios(model, tokenizer, TOPICS, here, **options)
    pd.testing.assert_frame_equal(found, expected)


def test_a_piece_that_kills_is_named(model, tokenizer):
    with pytest.raises(LostRowsError, match="piece 1 of corpus 3") as error:
        perplexity_ratios(
            model, tokenizer, TOPICS, {"c": "I love"}, engine=PlayedEngine(deadly=[10])
        )
    assert error.value.numbers == [10]


# --- what is refused ---


def test_steering_that_is_only_here_is_refused(model, tokenizer, vector):
    """A worker has a model of its own: hooks on this one, or a callable for it, mean nothing."""
    engine = PlayedEngine()
    with pytest.raises(ValueError, match="lambda model"):
        perplexity_ratios(
            model, tokenizer, TOPICS, {"v": lambda: vector.apply(model)}, engine=engine
        )
    with vector.apply(model):
        for call in (
            lambda: extract_activations(model, tokenizer, PAIRS, engine=engine),
            lambda: train_steering_vector(model, tokenizer, PAIRS, engine=engine),
            lambda: perplexity_ratios(model, tokenizer, TOPICS, {"c": "I"}, engine=engine),
            lambda: SWEEPS["logits"](model, tokenizer, vector, engine=engine),
        ):
            with pytest.raises(ValueError, match="has a hook"):
                call()
    assert not hasattr(engine, "workers")


@pytest.mark.parametrize("part", ["transformer.wte", "transformer.h.2.mlp", "lm_head", ""])
def test_hooks_beside_the_blocks_are_refused_too(model, tokenizer, vector, part):
    """Wherever they are: this process would have them, and a worker would not."""
    hooked = copy_sharing_weights(model)
    hooked.get_submodule(part).register_forward_hook(lambda module, args, output: None)
    for call in (
        lambda **more: extract_activations(hooked, tokenizer, PAIRS[:1], [1], **more),
        lambda **more: perplexity_ratios(
            hooked, tokenizer, {"t": TEXTS}, {"c": "I"}, bootstrap=0, **more
        ),
        lambda **more: sweep_logits(hooked, tokenizer, grid(vector), PROMPTS, **more),
    ):
        call()
        with pytest.raises(ValueError, match=f"{part or 'the model'} has a hook"):
            call(engine=PlayedEngine())


@pytest.mark.parametrize("engine", ["auto", 0, RayEngine])
def test_what_is_no_engine_is_refused(model, tokenizer, vector, tmp_path, engine):
    """Before a file is made."""
    path = tmp_path / "a.sweep"
    for call in (
        lambda: SWEEPS["completions"](model, tokenizer, vector, path=path, engine=engine),
        lambda: extract_activations(model, tokenizer, PAIRS, engine=engine),
        lambda: perplexity_ratios(model, tokenizer, TOPICS, {"c": "I"}, engine=engine),
    ):
        with pytest.raises(ValueError, match="expected an engine, such as"):
            call()
    assert not path.exists()


def test_functions_that_hold_the_model_here_are_refused(model, tokenizer, vector):
    """A worker would steer a copy, read its own model, and find that steering does nothing."""
    part = model.transformer
    conditions = {"v": lambda _: vector.apply(model), "p": lambda _: vector.apply(part)}
    for name, condition in conditions.items():
        with pytest.raises(ValueError, match="the model is another one"):
            perplexity_ratios(model, tokenizer, TOPICS, {name: condition}, engine=PlayedEngine())


def test_a_metric_that_cannot_be_sent_is_refused(model, tokenizer, vector):
    """It works in this process."""
    numbers = (number for number in range(9))
    metrics = {"m": lambda steered, plain: [float(numbers is None)] * len(steered)}
    sweep_logits(model, tokenizer, grid(vector), PROMPTS, metrics)
    with pytest.raises(ValueError, match="cannot go to the workers.*generator"):
        sweep_logits(model, tokenizer, grid(vector), PROMPTS, metrics, engine=PlayedEngine())
