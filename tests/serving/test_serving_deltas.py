"""What is added to the rows of a step, and the files that it comes from."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.serving.deltas import Deltas, add_to_output
from common.serving.offers import ScaledRows, read_offers, save_additions
from common.serving.requests import Steering
from common.serving.slices import Run, slices_of_rows, steered_runs
from common.vectors.activation_additions import ActivationAddition
from common.vectors.files import read_additions, write_additions
from common.vectors.steering_vector import SteeringVector

LAYERS, D_MODEL = 6, 8


def vector(seed: int, layers=(2, 3), d_model=D_MODEL) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({n: torch.randn(d_model, generator=generator) for n in layers})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(["love", "hate"]):
        vector(seed).save(folder / f"{name}.safetensors")
    vector(2, layers=[7]).save(folder / "deep.safetensors")
    vector(2, d_model=9).save(folder / "wide.safetensors")
    (vector(2) * float("inf")).save(folder / "endless.safetensors")
    SteeringVector({2: torch.ones(D_MODEL)}, "mlp").save(folder / "mlp.safetensors")
    additions = [ActivationAddition(2.0, 3, prompt="the garden")]
    additions.append(ActivationAddition(-2.0, 3, prompt="love"))
    save_additions(folder / "garden.safetensors", model, tokenizer, additions)
    return folder


def config(folder, **more) -> dict:
    return {"vectors": {"love": str(folder / "love.safetensors")}, "max_coeff": 20} | more


def read(given: object):
    return read_offers(given, LAYERS, D_MODEL, torch.float32)


def test_what_is_offered_is_what_the_files_hold(folder):
    menu, served = read(config(folder))
    offer = menu.offers["love"]
    assert offer.layers == (2, 3) and offer.tokens is None and menu.max_coeff == 20
    for layer, expected in vector(0).layer_activations.items():
        assert torch.equal(served["love"].rows[layer], expected[None])
    both = {n: str(folder / f"{n}.safetensors") for n in ("love", "hate")}
    menu, _ = read(config(folder, vectors=both))
    assert menu.offers["love"] == offer and menu.offers["hate"].digest != offer.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_any_dtype_are_served_in_float32(tmp_path, dtype):
    """A coefficient multiplies them before they are rounded to the dtype of the model."""
    path = tmp_path / "love.safetensors"
    vector(0).to(dtype).save(path)
    _, served = read({"vectors": {"love": str(path)}, "max_coeff": 20})
    rows = served["love"].rows[2]
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0], vector(0).layer_activations[2].to(dtype).float())
    scaled = ScaledRows(served, torch.bfloat16).get("love", 0.3, 2)
    assert torch.equal(scaled, (0.3 * rows).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vectors": {}}, "expected at least one file"),
        ({"vectors": {"love": 3}}, "expected files by name"),
        ({"vectors": "love.safetensors"}, "expected files by name"),
        ({"additions": {"garden": 3}}, "expected files by name"),
        ({"additions": ["garden.safetensors"]}, "expected files by name"),
        ({"vectors": {"": "love"}}, "expected files by name"),
        ({"vectors": {"love": ""}}, "expected files by name"),
        ({"max_coeff": -1}, "expected a positive number as max_coeff"),
        ({"vector": {}}, "expected a mapping with vectors, additions, max_coeff"),
        ({"max_coeff": 0}, "expected a positive number as max_coeff"),
        ({"max_coeff": float("nan")}, "expected a finite number as max_coeff"),
        ({"additions": {"love": "x"}}, "name of a vector and of an addition"),
        ({"additions": {"a": "love"}}, "holds no activation addition"),
        ({"vectors": {"a": "garden"}}, "holds no steering vector"),
        ({"vectors": {"a": "deep"}}, "steers layer 7.*layers 0 to 5"),
        ({"vectors": {"a": "wide"}}, "has 9 numbers.*d_model is 8"),
        ({"vectors": {"a": "endless"}}, "has nan or inf for layer 2"),
        ({"vectors": {"a": "mlp"}}, "acts on 'mlp'"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused_when_it_starts(folder, more, message):
    for kind, paths in more.items():
        if isinstance(paths, dict):
            names = {n: p for n, p in paths.items() if isinstance(p, str)}
            found = {n: folder / f"{p}.safetensors" for n, p in names.items()}
            more = {kind: paths | {n: str(p) for n, p in found.items() if p.exists()}}
    with pytest.raises(ValueError, match=message):
        read(config(folder, **more))


def test_first_and_last_layer_may_be_steered(tmp_path):
    """No number is larger, in any layer, than the one by which coefficients are limited."""
    path = tmp_path / "love.safetensors"
    rows = {layer: torch.full([D_MODEL], -1.0 - layer) for layer in (0, LAYERS - 1)}
    SteeringVector(rows).save(path)
    offer = read({"vectors": {"love": str(path)}, "max_coeff": 20})[0].offers["love"]
    assert offer.layers == (0, LAYERS - 1) and offer.largest == LAYERS


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layers_that_are_not_there_are_refused(tmp_path, layer):
    path = tmp_path / "love.safetensors"
    SteeringVector({layer: torch.ones(D_MODEL)}).save(path)
    with pytest.raises(ValueError, match=f"steers layer {layer}, .* layers 0 to {LAYERS - 1}"):
        read({"vectors": {"love": str(path)}, "max_coeff": 20})


@pytest.mark.parametrize("given", [None, [], "love.safetensors", 3])
def test_something_else_than_a_mapping_is_refused(given):
    with pytest.raises(ValueError, match="expected a mapping with vectors, additions, max_coeff"):
        read(given)


def test_an_engine_needs_a_limit_and_files_that_exist(folder):
    assert read(config(folder, max_coeff=0.5))[0].max_coeff == 0.5
    with pytest.raises(ValueError, match="needs max_coeff"):
        read({"vectors": {"love": str(folder / "love.safetensors")}})
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        read(config(folder, vectors={"a": str(folder / "none.safetensors")}))


def test_an_addition_is_the_sum_of_what_its_prompts_have(folder, model, tokenizer):
    d_model = model.config.hidden_size
    paths = {"garden": str(folder / "garden.safetensors")}
    given = {"additions": paths, "max_coeff": 20}
    menu, served = read_offers(given, model.config.num_hidden_layers, d_model, torch.float32)
    rows = served["garden"].rows
    ids = {
        text: ActivationAddition(1.0, 3, prompt=text).token_ids(tokenizer)
        for text in ("the garden", "love")
    }
    longest = max(map(len, ids.values()))
    assert menu.offers["garden"].tokens == longest and list(rows) == [2]
    with torch.no_grad():
        read = {
            text: model(torch.tensor([row]), output_hidden_states=True).hidden_states[3][0]
            for text, row in ids.items()
        }
    expected = torch.zeros(longest, d_model)
    for text, coeff in (("the garden", 2.0), ("love", -2.0)):
        expected[: len(ids[text])] += coeff * read[text]
    torch.testing.assert_close(rows[2], expected, rtol=0, atol=1e-4)


def test_what_a_block_reads_is_what_the_one_before_it_gives(tmp_path, model, tokenizer):
    """In the files there is only what blocks give, from the first one on."""
    written = {}
    for place in (1, "blocks.0.hook_resid_post", 4, "blocks.3.hook_resid_post"):
        addition = ActivationAddition(1.0, place, prompt="the garden")
        save_additions(tmp_path / f"{place}.safetensors", model, tokenizer, [addition])
        written[place] = read_additions(tmp_path / f"{place}.safetensors")
    for pre, post, layer in [
        (1, "blocks.0.hook_resid_post", 0),
        (4, "blocks.3.hook_resid_post", 3),
    ]:
        assert list(written[pre]) == list(written[post]) == [layer]
        torch.testing.assert_close(written[pre], written[post])
    both = [ActivationAddition(1.0, place, prompt="the garden") for place in written]
    save_additions(tmp_path / "both.safetensors", model, tokenizer, both)
    sums = read_additions(tmp_path / "both.safetensors")
    assert list(sums) == [0, 3]
    torch.testing.assert_close(sums[3], 2 * written[4][3])


@pytest.mark.parametrize("place", [0, (3, "mlp")])
def test_an_addition_where_engines_do_not_add_is_refused(tmp_path, model, tokenizer, place):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="engines add after a block"):
        save_additions(path, model, tokenizer, [ActivationAddition(1.0, place, prompt="the")])
    assert not path.exists()
    with pytest.raises(ValueError, match="at least one ActivationAddition"):
        save_additions(path, model, tokenizer, [])


# --- the files of additions ---


def test_what_an_addition_adds_survives_its_file(tmp_path):
    """Layers in order, of one tensor or of several, however it lies in memory."""
    path = tmp_path / "folder" / "a.safetensors"
    turned = torch.randn(D_MODEL, 3).T
    write_additions(path, {12: turned, 3: turned, 0: ROWS, 1: ROWS})
    found = read_additions(path)
    assert list(found) == [0, 1, 3, 12] and torch.equal(found[12], turned)
    assert torch.equal(found[3], turned) and torch.equal(found[0], ROWS)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_additions(path, {1: turned})
    assert list(read_additions(path)) == [0, 1, 3, 12]
    write_additions(path, {1: turned}, overwrite=True)
    assert list(read_additions(path)) == [1]


OURS = {"format": "activation_addition", "format_version": "1"}
ROWS = torch.ones(3, D_MODEL)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"layer.1": ROWS}, OURS | {"format_version": "2"}, "has format '2'; this version reads"),
        ({"layer.1": ROWS}, {"format": "activation_addition"}, "has format None"),
        ({"layer.1": ROWS}, OURS | {"format": "steering_vector"}, "no activation addition"),
        ({"layer.1": ROWS}, None, "no activation addition"),
        ({"layer.1": ROWS, "layer.2": ROWS[:2].clone()}, OURS, "no activation addition"),
        ({"layer.1": ROWS, "layer.2": ROWS[0].clone()}, OURS, "no activation addition"),
        ({"layer.1": ROWS[0].clone()}, OURS, "no activation addition"),
        ({"layer.1": ROWS[:0].clone()}, OURS, "no activation addition"),
        ({"layer.1": ROWS, "layer.2": ROWS[:0].clone()}, OURS, "no activation addition"),
        ({"layer.1": ROWS, "other": ROWS.clone()}, OURS, "no activation addition"),
        ({"layer.one": ROWS}, OURS, "no activation addition"),
        ({"xlayer.1": ROWS}, OURS, "no activation addition"),
    ],
)
def test_a_file_that_holds_no_addition_is_refused(tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=message) as error:
        read_additions(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value)


def test_a_file_of_an_addition_that_is_cut_off_or_missing_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no file '.*a\.safetensors'"):
        read_additions(path)
    write_additions(path, {1: ROWS})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_additions(path)


def test_additions_are_replaced_only_if_one_says_so(tmp_path, model, tokenizer):
    path = tmp_path / "a.safetensors"
    once, twice = ([ActivationAddition(coeff, 3, prompt="the")] for coeff in (1.0, 2.0))
    save_additions(path, model, tokenizer, once)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_additions(path, model, tokenizer, twice)
    rows = read_additions(path)[2]
    save_additions(path, model, tokenizer, twice, overwrite=True)
    torch.testing.assert_close(read_additions(path)[2], 2 * rows)


# --- the matrices of a step ---


@pytest.fixture(scope="module")
def rows(folder) -> ScaledRows:
    paths = {n: str(folder / f"{n}.safetensors") for n in ("love", "hate")}
    _, served = read(config(folder, vectors=paths))
    front = served["love"]._replace(rows={2: torch.arange(3 * D_MODEL).float().view(3, D_MODEL)})
    return ScaledRows(served | {"front": front}, torch.float32)


STEERINGS = st.one_of(
    st.none(),
    st.builds(
        Steering,
        st.sampled_from(["love", "hate"]),
        st.sampled_from([1.0, -3.0, 0.5]),
        st.sampled_from([(2,), (3,), (2, 3)]),
        st.integers(0, 4),
    ),
    st.builds(
        Steering,
        st.just("front"),
        st.sampled_from([1.0, -2.0]),
        st.just((2,)),
        st.just(0),
        st.just(3),
    ),
)
REQUESTS = st.lists(st.tuples(STEERINGS, st.integers(0, 6), st.integers(1, 5)), max_size=6)


@given(steps=st.lists(REQUESTS, min_size=1, max_size=4))
def test_every_row_gets_what_its_request_asks_for(rows, steps):
    """Row by row, in steps that follow each other, as a loop over all tokens would do it."""
    deltas = Deltas(rows)
    for step in [*steps, steps[-1]]:
        names = [f"request {number}" for number in range(len(step))]
        steerings = {name: asked for name, (asked, _, _) in zip(names, step) if asked}
        positions, lengths = [p for _, p, _ in step], [n for _, _, n in step]
        runs = steered_runs(slices_of_rows(names, lengths, positions), steerings)
        found = deltas.of_step(runs, sum(lengths))
        for layer in (2, 3):
            expected = []
            for asked, position, length in step:
                for token in range(position, position + length):
                    row = torch.zeros(D_MODEL)
                    if asked and layer in asked.layers and token in asked.selected(token, 1):
                        numbers = rows.served[asked.name].rows[layer]
                        row = asked.coeff * numbers[0 if asked.end is None else token]
                    expected.append(row)
            if layer in found:
                assert torch.equal(found[layer], torch.stack(expected))
            else:
                assert not expected or not torch.stack(expected).any()


def test_a_step_in_which_nothing_changed_takes_the_matrices_of_the_one_before(rows):
    """A token for each request: positions go on, and matter to additions alone."""
    deltas = Deltas(rows)
    love, front = Steering("love", 1.0, (2,)), Steering("front", 1.0, (2,), end=3)

    def step(*tokens: tuple, rows: int = 2) -> torch.Tensor:
        names = [f"request {number}" for number in range(len(tokens))]
        steerings = {name: asked for name, (asked, _) in zip(names, tokens) if asked}
        slices = slices_of_rows(names, [1] * len(tokens), [position for _, position in tokens])
        return deltas.of_step(steered_runs(slices, steerings), rows)[2]

    first = step((love, 5), (None, 7))
    assert step((love, 6), (None, 8)) is first
    assert step((front, 1), (love, 6)) is not step((front, 2), (love, 7))
    # What is not steered has rows, too, as those that come to the batch.
    assert len(step((love, 7), (None, 9))) == 2
    assert len(step((love, 8), (None, 10), (None, 0), rows=3)) == 3


LOVE, FRONT = Steering("love", 1.0, (2, 3)), Steering("front", 1.0, (2,), end=3)


@pytest.mark.parametrize(
    ("steering", "change"),
    [
        (LOVE, {"steering": replace(LOVE, name="hate")}),
        (LOVE, {"steering": replace(LOVE, coeff=-3.0)}),
        (LOVE, {"steering": replace(LOVE, layers=(2,))}),
        (LOVE, {"steering": replace(LOVE, layers=(3,))}),
        (LOVE, {"row": 1}),
        (LOVE, {"length": 1}),
        (FRONT, {"steering": replace(FRONT, coeff=2.0)}),
        (FRONT, {"position": 1}),
    ],
)
def test_a_step_that_differs_in_one_thing_has_its_own_matrices(rows, steering, change):
    """Nothing of the step before is taken."""
    deltas, run = Deltas(rows), Run("a request", steering, row=0, position=0, length=2)
    before, changed = deltas.of_step([run], 4), run._replace(**change)
    found, alone = deltas.of_step([changed], 4), Deltas(rows).of_step([changed], 4)
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[layer], alone[layer]) for layer in alone)
    same = [torch.equal(found[layer], before[layer]) for layer in found if layer in before]
    assert found.keys() != before.keys() or not all(same)


def test_only_the_last_rows_used_are_kept(rows):
    few = ScaledRows(rows.served, torch.float32, kept=2)
    for coeff in (1.0, 2.0, 1.0, 3.0):
        few.get("love", coeff, 2)
    assert [coeff for _, coeff, _ in few.scaled] == [1.0, 3.0]
    assert few.get("love", 3.0, 2) is few.get("love", 3.0, 2)


def test_the_stream_is_steered_whether_a_layer_returns_it_or_its_parts():
    hidden, residual, delta = torch.randn(3, 5, D_MODEL)
    assert torch.equal(add_to_output(hidden, delta), hidden + delta)
    parts = add_to_output((hidden, residual), delta)
    assert isinstance(parts, tuple) and torch.equal(parts[1], residual)
    torch.testing.assert_close(parts[0] + parts[1], hidden + residual + delta)


def test_rows_that_are_padding_stay_as_they_are():
    hidden, delta = torch.randn(7, D_MODEL), torch.randn(5, D_MODEL)
    steered = add_to_output(hidden, delta)
    assert torch.equal(steered[:5], hidden[:5] + delta) and torch.equal(steered[5:], hidden[5:])


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(4, D_MODEL),
        torch.zeros(5, D_MODEL + 1),
        torch.zeros(1, 5, D_MODEL),
        torch.zeros(5, D_MODEL, 1),
        (torch.zeros(5, D_MODEL), None),
        (torch.zeros(5, D_MODEL),) * 3,
    ],
)
def test_an_output_that_is_no_stream_is_refused(output):
    shape = list(output[0].shape if isinstance(output, tuple) else output.shape)
    with pytest.raises(ValueError, match=f"expected the stream or.*got {re.escape(f'[{shape}')}"):
        add_to_output(output, torch.zeros(5, D_MODEL))
