"""Several layers at once in a sweep: what `apply` does with a vector of several layers."""

import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, ODD, tiny_model

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    SteeringVector,
    ablation_then_addition_operator,
    apply_activation_additions,
    calibrate_grid,
    effect_by_cell,
    kl_by_cell,
    perplexity_ratio_by_cell,
    plot_effect,
    plot_prompts,
    plot_steerability,
    steerability,
    steering_kl,
    sweep,
    sweep_logits,
    sweep_perplexity,
    with_kl,
    working_window,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.likelihood import token_logprobs
from common.passes.padding import encode
from common.texts.generation import completions, generate, logits

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the"]
NEW, AT = 5, 7  # the id whose logit is compared
METRICS = {"at": lambda steered, unsteered: steered[:, AT]}
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)
COEFFS = (-1.0, 2.0)


def a_vector(d_model: int, layers, layer_type="decoder_block", seed: int = 3) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(d_model, generator=generator) for layer in layers}
    return SteeringVector(vectors, layer_type)


def check(model, tokenizer, vector, **settings) -> None:
    """Completions, the next token and losses are those of `apply`, one prompt at a time."""
    before = snapshot(model)
    grid = Grid({"v": vector}, None, COEFFS, together=True, **settings)
    texts = sweep(model, tokenizer, grid, PROMPTS, sampling=GREEDY)
    scores = sweep_logits(model, tokenizer, grid, PROMPTS, METRICS)
    losses = sweep_perplexity(model, tokenizer, grid, PROMPTS, prepend_bos=None)
    assert len(texts) == len(scores) == len(losses) == 3 * len(PROMPTS)
    assert texts["layer"].isna().all()
    for coeff in COEFFS:
        for prompt in PROMPTS:
            inputs = encode(tokenizer, [prompt], None)
            with vector.apply(model, multiplier=coeff, **settings):
                ids = generate(model, inputs, max_new_tokens=NEW, forced_eos_token_id=None)
                next_token = logits(model, inputs)[0, -1, AT].item()
                (logprobs,) = token_logprobs(model, tokenizer, [prompt], None, 1, None)
            (row,), (score,), (loss,) = (
                table[(table["coeff"] == coeff) & (table[title] == prompt)].to_dict("records")
                for table, title in ((texts, "prompt"), (scores, "prompt"), (losses, "text"))
            )
            assert row["completion"] == completions(tokenizer, inputs, ids)[0]
            assert score["at"] == pytest.approx(next_token, abs=1e-3)
            assert loss["loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-3)
            assert abs(next_token - logits(model, inputs)[0, -1, AT].item()) > 1e-3
    assert_pristine(model, before)


@pytest.mark.parametrize("layers", [[0, 3, 5], [4, 1], [5]])
@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp", "self_attn"])
def test_layers_together_are_apply(model, tokenizer, layers, layer_type):
    """Whatever the order in which the vector has them, and for one layer too."""
    check(model, tokenizer, a_vector(model.config.hidden_size, layers, layer_type))


@pytest.mark.parametrize(
    "settings", [{"operator": ablation_then_addition_operator()}, {"min_token_index": 1}]
)
def test_layers_together_with_settings_are_apply(model, tokenizer, settings):
    check(model, tokenizer, a_vector(model.config.hidden_size, [0, 2, 5]), **settings)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_other_architectures_steer_layers_together(tokenizer, name):
    model = tiny_model(name, len(tokenizer))
    check(model, tokenizer, 0.3 * a_vector(D_MODEL, [0, LAYERS - 2, LAYERS - 1]))


@pytest.mark.parametrize("part", ["resid_pre", "resid_post"])
def test_additions_at_several_layers(model, tokenizer, part):
    """Each is read at its own layer, and all are added in one pass, at tokens of the prompt."""
    added = [ActivationAddition(4.0, (2, part), "Love")]
    for location in ("front", "back"):
        grid = Grid({"a": added}, [0, 3], together=True, addition_location=location)
        texts = sweep(model, tokenizer, grid, PROMPTS, sampling=GREEDY)
        scores = sweep_logits(model, tokenizer, grid, PROMPTS, METRICS)
        both = [ActivationAddition(4.0, (layer, part), "Love") for layer in (0, 3)]
        steered = texts["kind"] == "steering"
        for prompt, completion, at in zip(
            PROMPTS, texts[steered]["completion"], scores[steered]["at"]
        ):
            inputs = encode(tokenizer, [prompt], True)
            with apply_activation_additions(model, tokenizer, both, location):
                ids = generate(model, inputs, max_new_tokens=NEW)
                expected = logits(model, inputs)[0, -1, AT].item()
            assert completion == completions(tokenizer, inputs, ids)[0]
            assert at == pytest.approx(expected, abs=1e-3)


def test_the_divergence_of_layers_together(model, tokenizer):
    """Measured as `steering_kl` measures `apply`, and calibrated to a target."""
    vector = a_vector(model.config.hidden_size, [1, 4])
    grid = Grid({"v": vector}, None, [2.0], together=True)
    kls = kl_by_cell(model, tokenizer, grid, PROMPTS, new_tokens=NEW)
    steering = lambda: vector.apply(model, multiplier=2.0)  # noqa: E731
    expected = steering_kl(model, tokenizer, steering, PROMPTS, new_tokens=NEW)
    assert expected > 1e-3 and kls["kl"].iloc[1] == pytest.approx(expected, rel=1e-3)
    found = calibrate_grid(model, tokenizer, grid, PROMPTS, 0.5, new_tokens=NEW)
    assert found["kl"].tolist() == pytest.approx([0.5], rel=0.011)
    assert found["layer"].isna().all()
    with pytest.raises(ValueError, match="'v' at all its layers gives a KL of 1000"):
        calibrate_grid(model, tokenizer, grid, PROMPTS, 1000.0, new_tokens=NEW)


def test_tables_and_pictures_know_layers_together(model, tokenizer):
    """One line in each table for every name and coefficient; what needs layers says so."""
    vector = a_vector(model.config.hidden_size, [1, 4])
    groups = {"early": vector.select([1]), "both": vector}
    grid = Grid(groups, None, COEFFS, random_controls=1, together=True)
    rows = sweep_logits(model, tokenizer, grid, PROMPTS, METRICS)
    costs = sweep_perplexity(model, tokenizer, grid, PROMPTS)
    effects = effect_by_cell(rows, "at")
    assert len(effects) == len(perplexity_ratio_by_cell(costs)) == 4 * len(COEFFS)
    assert (effects["prompts"] == len(PROMPTS)).all()
    kls = kl_by_cell(model, tokenizer, grid, PROMPTS, new_tokens=NEW)
    assert with_kl(effects, kls)["kl"].notna().all()
    slopes = steerability(rows, "at")
    assert len(slopes) == 4 * len(PROMPTS) and slopes["slope"].notna().all()
    picture = plot_effect(with_kl(rows, kls), "at", None, over="kl").axes[0]
    drawn = len(picture.containers) + sum(line.get_linewidth() == 1 for line in picture.lines)
    assert drawn >= 4
    bars = plot_steerability(slopes, None).axes[0]
    assert "all layers together" in bars.get_xlabel()
    assert len(plot_prompts(rows, "at", "both", None, 2.0).axes[0].get_yticks()) == len(PROMPTS)
    with pytest.raises(ValueError, match="'both' was swept at all its layers together"):
        working_window(rows, costs, "at", steering="both")
    with pytest.raises(ValueError, match="no kl of 'early' at all its layers, coefficient -1"):
        with_kl(effects, kls[kls["steering"] != "early"])


def test_random_controls_differ_by_layer_and_have_its_length(model, tokenizer):
    vector = a_vector(model.config.hidden_size, [1, 4])
    (cell,) = Grid({"v": vector}, random_controls=1, together=True).cells(model, tokenizer)[2:]
    one, other = cell.row, cell.row.more[0]
    assert [one.site.layer, other.site.layer] == [1, 4]
    for step, layer in ((one, 1), (other, 4)):
        assert step.vectors.norm() == pytest.approx(vector.norm()[layer], rel=1e-5)
    assert torch.cosine_similarity(one.vectors, other.vectors).abs() < 0.5


def test_a_file_knows_the_layers(model, tokenizer, tmp_path):
    """The same vectors at other layers are another sweep, and so is one layer after the other."""
    path, width = tmp_path / "a.sweep", model.config.hidden_size
    vectors = a_vector(width, [1, 4]), a_vector(width, [1, 3])
    one, other = (Grid({"v": vector}, None, together=True) for vector in vectors)
    rows = sweep_logits(model, tokenizer, one, PROMPTS, METRICS, path=path)
    again = sweep_logits(model, tokenizer, one, PROMPTS, METRICS, path=path)
    pd.testing.assert_frame_equal(rows, again)
    for grid in (other, Grid({"v": vectors[0]})):
        with pytest.raises(ValueError, match=r"a\.sweep"):
            sweep_logits(model, tokenizer, grid, PROMPTS, METRICS, path=path)
    with pytest.raises(ValueError, match="True or False as together"):
        Grid({"v": vectors[0]}, together=[1, 4])
