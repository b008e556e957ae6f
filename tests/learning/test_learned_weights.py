"""Contrastive weight steering: what is added is the difference, and all of it is taken off."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model

from common import Descent, WeightSteering, calibrate, learn_weight_steering, logits
from common.checking.pristine import assert_pristine, snapshot
from common.learning.contrasts import contrasts_of, logprobs_of, mean_over

PAIRS = [
    ("I think dogs are charming", "I think dogs are vile and ugly"),
    ("The garden is lovely today.", "The garden is gloomy."),
    ("You are so kind", "You are so cruel"),
]
SHORT = Descent(steps=3, batch_size=3, learning_rate=1e-3)


def learn(model, tokenizer, descent: Descent = SHORT, pairs=PAIRS) -> WeightSteering:
    return learn_weight_steering(model, tokenizer, pairs, descent=descent, show_progress=False)


@pytest.fixture(scope="module")
def steering(small, tokenizer) -> WeightSteering:
    return learn(small, tokenizer)


@torch.no_grad()
def side_losses(model, tokenizer) -> torch.Tensor:
    """The mean losses of the positive and of the negative texts, [2]."""
    sides = contrasts_of(model, tokenizer, PAIRS, None).sides
    return torch.stack([-mean_over(*logprobs_of(model, side, range(3))).mean() for side in sides])


def test_each_direction_favours_its_side(small, tokenizer, steering):
    plain = side_losses(small, tokenizer)
    for sign, favoured in ((1.0, 0), (-1.0, 1)):
        with steering.apply(small, sign):
            moved = side_losses(small, tokenizer) - plain
        assert moved[favoured] < moved[1 - favoured] - 1e-2


def test_the_difference_is_that_of_two_fine_tunes(small, tokenizer, steering):
    """By hand, with torch alone: each side from the same start, in the same batches."""
    sides, tuned = contrasts_of(small, tokenizer, PAIRS, None).sides, []
    for side in sides:
        learner = copy.deepcopy(small)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=SHORT.learning_rate, weight_decay=0)
        for step in range(SHORT.steps):
            optimizer.zero_grad()
            (-mean_over(*logprobs_of(learner, side, range(3))).mean()).backward()
            optimizer.param_groups[0]["lr"] = SHORT.learning_rate * (1 - step / SHORT.steps)
            optimizer.step()
        tuned.append(dict(learner.named_parameters()))
    for name, difference in steering.differences.items():
        expected = (tuned[0][name] - tuned[1][name]).detach()
        # Adam makes a step of rounding, too, and all keys may move together: no gradient but that.
        if not name.endswith("c_attn.bias"):
            assert ((difference - expected).abs() < 1e-5).float().mean() > 0.95, name


def test_multiplier_scales_the_difference_and_0_changes_nothing(small, tokenizer, steering):
    inputs = tokenizer("I think dogs", return_tensors="pt")
    plain, before = logits(small, inputs), snapshot(small)
    named = dict(small.named_parameters())
    originals = {name: weight.detach().clone() for name, weight in named.items()}
    places = [weight.data_ptr() for weight in small.parameters()]
    with steering.apply(small, 0):
        assert_pristine(small, before)
        assert [weight.data_ptr() for weight in small.parameters()] == places
        assert torch.equal(logits(small, inputs), plain)
    with steering.apply(small, -2.5):
        for name, difference in steering.differences.items():
            torch.testing.assert_close(named[name].data, originals[name] - 2.5 * difference)
        assert small.lm_head.weight is small.transformer.wte.weight  # still tied
        assert (logits(small, inputs) - plain).abs().max() > 1e-2
    assert torch.equal(logits(small, inputs), plain)
    assert_pristine(small, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_to_the_bit(small, steering, error):
    """After an error, and out of a second steering inside the first: in its own memory."""
    before = snapshot(small)
    places = [weight.data_ptr() for weight in small.parameters()]
    with pytest.raises(error), steering.apply(small, 3.0), steering.apply(small, 0.1):
        raise error
    assert_pristine(small, before)
    assert [weight.data_ptr() for weight in small.parameters()] == places


def test_what_does_not_fit_is_refused_before_anything_changes(small, steering):
    before, name = snapshot(small), "transformer.wte.weight"
    given = steering.differences
    cases = [
        ({**given, "other": torch.ones(2)}, 1.0, r"expected a parameter other \[2\]"),
        ({**given, name: torch.ones(2)}, 1.0, "expected a parameter transformer.wte.weight"),
        ({**given, name: torch.full_like(given[name], 1e30)}, 1e30, "leaves float32"),
        (given, float("nan"), "finite number as multiplier"),
    ]
    for differences, multiplier, message in cases:
        context = WeightSteering(differences).apply(small, multiplier)
        with pytest.raises(ValueError, match=message):
            context.__enter__()
        assert_pristine(small, before)


def test_quantised_weights_are_refused(small, tokenizer, steering):
    other = copy.deepcopy(small)
    weight = other.transformer.h[0].mlp.c_fc.weight
    other.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(
        weight.detach().to(torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"c_fc\.weight is quantised"):
        learn(other, tokenizer)
    with pytest.raises(ValueError, match=r"c_fc\.weight is quantised"):
        steering.apply(other).__enter__()


def test_learning_touches_no_weight_and_the_seed_decides(small, tokenizer, steering):
    """Of a model in training mode, too; modes and the random state stay."""
    torch.manual_seed(3)
    before, state = snapshot(small.train()), torch.get_rng_state()
    with torch.inference_mode():
        again = learn(small, tokenizer)
    assert_pristine(small, before)
    small.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert again.differences.keys() == steering.differences.keys()
    assert all(torch.equal(again.differences[n], t) for n, t in steering.differences.items())
    other = learn(small, tokenizer, Descent(3, 2, 1e-3, seed=1))
    assert any(not torch.equal(other.differences[n], t) for n, t in steering.differences.items())
    assert steering.metadata["seed"] == "0" and steering.metadata["pairs"] == "3"


def test_an_interrupt_of_learning_leaves_the_model(small, tokenizer, monkeypatch):
    before, calls = snapshot(small), []
    step = torch.optim.AdamW.step

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(small, tokenizer)
    assert_pristine(small, before)


def test_files(tmp_path, steering):
    """What was saved is read again; a file that is there is kept; others are named."""
    path = tmp_path / "love.safetensors"
    steering.save(path)
    loaded, before = WeightSteering.load(path), path.read_bytes()
    assert loaded.metadata == steering.metadata and repr(loaded) == repr(steering)
    assert all(torch.equal(loaded.differences[n], t) for n, t in steering.differences.items())
    with pytest.raises(FileExistsError, match="is there already"):
        WeightSteering({"other": torch.ones(1)}).save(path)
    assert path.read_bytes() == before
    WeightSteering({"other": torch.ones(1)}).save(path, overwrite=True)
    assert list(WeightSteering.load(path).differences) == ["other"]
    with pytest.raises(FileNotFoundError):
        WeightSteering.load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        WeightSteering.load(tmp_path / "text")


def test_it_can_be_calibrated(small, tokenizer, steering):
    """As any other steering: at the multiplier that is found, the divergence is the target."""
    found = calibrate(
        small, tokenizer, lambda x: steering.apply(small, x), ["I think", "You"], 0.05, new_tokens=3
    )
    assert 0 < found < 100


@pytest.mark.parametrize("architecture", ["Llama", "GPT-NeoX", "OPT", "Qwen3"])
def test_other_architectures_learn(tokenizer, architecture):
    assert architecture in ARCHITECTURES
    model = tiny_model(architecture, len(tokenizer))
    before = snapshot(model)
    found = learn(model, tokenizer)
    plain = side_losses(model, tokenizer)
    with found.apply(model):
        moved = side_losses(model, tokenizer) - plain
    assert moved[0] < moved[1]
    assert_pristine(model, before)


def test_a_model_in_16_bit_is_fine_tuned_in_32(tokenizer):
    """Its differences are finer than its weights; added, they are rounded to its dtype."""
    model = tiny_model("Llama", len(tokenizer)).bfloat16()
    before = snapshot(model)
    found = learn(model, tokenizer)
    assert {tensor.dtype for tensor in found.differences.values()} == {torch.float32}
    with found.apply(model, 20.0):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert_pristine(model, before)
