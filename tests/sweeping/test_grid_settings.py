"""Operators, later tokens and parts of a block in a sweep: what `apply` does, row by row."""

import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, MISSING, ODD, tiny_model

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    ablation_operator,
    ablation_then_addition_operator,
    calibrate_grid,
    kl_by_cell,
    norm_preserving_addition_operator,
    steering_kl,
    sweep,
    sweep_logits,
    sweep_perplexity,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.likelihood import token_logprobs
from common.passes.padding import encode
from common.texts.generation import completions, generate, logits
from common.vectors.steering_vector import SteeringVector

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the"]
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
NEW, AT = 5, 7  # the id whose logit is compared
SETTINGS = {
    "ablation": {"operator": ablation_operator()},
    "ablation, then addition": {"operator": ablation_then_addition_operator()},
    "norm": {"operator": norm_preserving_addition_operator(), "min_token_index": 1},
    "from 2 on": {"min_token_index": 2},
    "from the last token on": {"min_token_index": -1},
}
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)


def a_vector(d_model: int, layers, layer_type="decoder_block", size: float = 1.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(3)
    vectors = {layer: size * torch.randn(d_model, generator=generator) for layer in layers}
    return SteeringVector(vectors, layer_type)


def check(model, tokenizer, vector, new: int = NEW, rel: float = 1e-3, **settings) -> None:
    """Completions, the next token and losses are those of `apply`, one prompt at a time."""
    before, coeffs = snapshot(model), [-1.0, 2.0]
    grid = Grid({"v": vector}, None, coeffs, **settings)
    greedy = Sampling(max_new_tokens=new, temperature=0.0)
    texts = sweep(model, tokenizer, grid, PROMPTS, sampling=greedy)
    metrics = {"at": lambda steered, unsteered: steered[:, AT]}
    scores = sweep_logits(model, tokenizer, grid, PROMPTS, metrics)
    losses = sweep_perplexity(model, tokenizer, grid, PROMPTS, prepend_bos=None)
    keys = ["layer", "coeff", "prompt"]
    steered = texts[texts["kind"] == "steering"]
    assert len(steered) == len(vector.layer_activations) * len(coeffs) * len(PROMPTS)
    at = scores.set_index(keys)["at"]
    loss = losses.rename(columns={"text": "prompt"}).set_index(keys)["loss"]
    moved = 0
    for row in steered.itertuples():
        one = SteeringVector({row.layer: vector.layer_activations[row.layer]}, vector.layer_type)
        inputs = encode(tokenizer, [row.prompt], None)
        with one.apply(model, multiplier=row.coeff, **settings):
            ids = generate(model, inputs, max_new_tokens=new, forced_eos_token_id=None)
            next_token = logits(model, inputs)[0, -1, AT].item()
            (logprobs,) = token_logprobs(model, tokenizer, [row.prompt], None, 1, None)
        where = row.layer, row.coeff, row.prompt
        assert row.completion == completions(tokenizer, inputs, ids)[0], where
        assert at[where] == pytest.approx(next_token, abs=1e-3), where
        assert loss[where] == pytest.approx(-logprobs.mean().item(), rel=rel), where
        moved += abs(next_token - logits(model, inputs)[0, -1, AT].item()) > 1e-3
    assert moved
    assert_pristine(model, before)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
def test_a_sweep_with_settings_is_apply_with_them(model, tokenizer, name, layer_type):
    """At the first, a middle and the last layer."""
    vector = a_vector(model.config.hidden_size, [0, 3, 5], layer_type)
    check(model, tokenizer, vector, **SETTINGS[name])


@pytest.mark.parametrize("layer_type", PARTS)
def test_every_part_of_a_block_can_be_swept(model, tokenizer, layer_type):
    check(model, tokenizer, a_vector(model.config.hidden_size, [0, 2, 5], layer_type))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_other_architectures_sweep_operators_and_parts(tokenizer, name):
    model = tiny_model(name, len(tokenizer))
    edges = [0, LAYERS - 1]
    settings = {"operator": norm_preserving_addition_operator(), "min_token_index": 1}
    check(model, tokenizer, a_vector(D_MODEL, edges), 3, **settings)
    if name in ARCHITECTURES and "mlp" not in MISSING.get(name, ()):
        check(model, tokenizer, a_vector(D_MODEL, edges, "mlp"), 3, **settings)


def test_unsteered_rows_are_left_alone_to_the_last_bit(model, tokenizer):
    """An operator may do something with the vector 0; the rows that are not steered miss it."""
    vector = a_vector(model.config.hidden_size, [2])
    strange = Grid({"v": vector}, None, [3.0], operator=lambda hidden, vector: 1.0 + 0 * hidden)
    metrics = {"at": lambda steered, unsteered: steered[:, AT]}
    for run, column, settings in (
        (sweep_logits, "at", {"metrics": metrics}),
        (sweep, "completion", {"sampling": GREEDY}),
    ):
        one, other = (
            run(model, tokenizer, grid, PROMPTS, **settings)
            for grid in (strange, Grid({"v": vector}))
        )
        unsteered = one["kind"] == "unsteered"
        assert one[unsteered][column].tolist() == other[unsteered][column].tolist()
        assert one[~unsteered][column].tolist() != other[~unsteered][column].tolist()


def test_a_file_knows_how_it_was_steered(model, tokenizer, tmp_path):
    """Another operator, another first token, another part of the block: another sweep."""
    vector = a_vector(model.config.hidden_size, [2])
    grids = {name: Grid({"v": vector}, **settings) for name, settings in SETTINGS.items()}
    grids["plain"] = Grid({"v": vector})
    part = a_vector(model.config.hidden_size, [2], "mlp")
    grids["mlp"] = Grid({"v": part})
    for name, grid in grids.items():
        file = tmp_path / f"{name}.sqlite"
        rows = sweep_logits(model, tokenizer, grid, PROMPTS, path=file)
        assert sweep_logits(model, tokenizer, grid, PROMPTS, path=file).equals(rows)
        for other, another in grids.items():
            if other != name:
                with pytest.raises(ValueError, match=r"\.sqlite"):
                    sweep_logits(model, tokenizer, another, PROMPTS, path=file)


@pytest.mark.parametrize("name", ["norm", "from 2 on", "ablation, then addition"])
def test_the_divergence_knows_operators_too(model, tokenizer, name):
    vector, settings = a_vector(model.config.hidden_size, [1, 4]), SETTINGS[name]
    grid = Grid({"v": vector}, None, [2.0], **settings)
    kls = kl_by_cell(model, tokenizer, grid, PROMPTS, new_tokens=NEW)
    for row in kls[1:].itertuples():
        one = SteeringVector({row.layer: vector.layer_activations[row.layer]})
        expected = steering_kl(
            model,
            tokenizer,
            lambda one=one, row=row: one.apply(model, multiplier=row.coeff, **settings),
            PROMPTS,
            new_tokens=NEW,
        )
        assert expected > 1e-4 and row.kl == pytest.approx(expected, rel=1e-3)
    if name == "norm":
        found = calibrate_grid(model, tokenizer, grid, PROMPTS, 0.5, new_tokens=NEW)
        assert found["kl"].tolist() == pytest.approx([0.5, 0.5], rel=0.011)


def test_settings_that_mean_nothing_are_refused(model, tokenizer):
    vector = a_vector(model.config.hidden_size, [2])
    love = [ActivationAddition(1.0, 2, "Love")]
    for settings in ({"operator": ablation_operator()}, {"min_token_index": 1}):
        with pytest.raises(ValueError, match="are for steering vectors"):
            Grid({"v": vector}, controls={"w": love}, **settings)
    with pytest.raises(ValueError, match="as operator"):
        Grid({"v": vector}, operator=ablation_operator)
    with pytest.raises(ValueError, match="as min_token_index"):
        Grid({"v": vector}, min_token_index=0.5)
    grid = Grid({"v": vector}, min_token_index=-1)
    with pytest.raises(ValueError, match="counted from the front"):
        kl_by_cell(model, tokenizer, grid, PROMPTS)
