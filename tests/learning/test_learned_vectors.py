"""Learned vectors: gradients are right, steps lower the loss, and the model stays as it was."""

import math

import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, ODD, RECURRENT, tiny_model

from common import (
    Descent,
    SteeringVector,
    detect_concept,
    learn_bipo_vector,
    learn_likelihood_vector,
    learn_reft_r1,
    record_activations,
)
from common.checking.pristine import assert_pristine, snapshot
from common.learning.contrasts import contrasts_of, logprobs_of
from common.learning.descent import descend
from common.learning.likelihood import likelihood_loss
from common.learning.preference import bipo_loss, preference_loss, unsteered_likelihoods
from common.learning.rank_one import latents, rank_one_loss
from common.learning.vector import VectorTask

PAIRS = [
    ("I think dogs are charming", "I think dogs are vile and ugly"),
    ("The garden is lovely today.", "The garden is gloomy."),
    ("You are so kind", "You are so cruel"),
]
LAYER = 1
SHORT = Descent(steps=4, batch_size=3, learning_rate=0.02)
LEARNERS = {
    "likelihood": learn_likelihood_vector,
    "suppressing": lambda *given, **more: learn_likelihood_vector(*given, suppress=1.0, **more),
    "bipo": learn_bipo_vector,
    "reft_r1": lambda *given, **more: learn_reft_r1(*given, top_k=2, **more),
}


@pytest.fixture(scope="module")
def task(small, tokenizer) -> VectorTask:
    return VectorTask(small, tokenizer, PAIRS, LAYER, None)


def noise(seed: int, length: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return length * drawn / drawn.norm()


def learn(name: str, model, tokenizer, descent: Descent = SHORT, pairs=PAIRS, layer=LAYER):
    learner = LEARNERS[name]
    return learner(model, tokenizer, pairs, layer, descent=descent, show_progress=False)


# --- what counts ---


def test_tokens_count_from_where_the_texts_part(small, tokenizer):
    """Before that both sides have the same probabilities, so that nothing there can be learned."""
    contrasts = contrasts_of(small, tokenizer, PAIRS, True)
    (positive, counted), (negative, others) = (
        logprobs_of(small, side, range(3)) for side in contrasts.sides
    )
    for number, pair in enumerate(PAIRS):
        ids = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in pair]
        parted = next(at for at, (one, other) in enumerate(zip(*ids)) if one != other)
        for row, kept in zip(ids, (counted, others)):
            assert kept[number].nonzero()[:, 0].tolist() == list(range(parted - 1, len(row) - 1))
        same = slice(0, parted - 1)
        assert torch.allclose(positive[number, same], negative[number, same], atol=1e-5)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "expected a list of contrast pairs"),
        ([("Love is here", "Love is here")], "pair 0: expected two texts with a token each"),
        ([PAIRS[0], ("Love is", "Love is here")], "pair 1: .* put a prompt in front of both"),
        ([("Love", "Hate")], r"or a BOS \(prepend_bos=True\)"),
        ([("I love you " * 30, "I hate you " * 30)], "is longer than the 64 positions"),
    ],
)
@pytest.mark.parametrize("name", ["likelihood", "bipo", "reft_r1"])
def test_pairs_that_teach_nothing_are_refused(small, tokenizer, name, pairs, message):
    with pytest.raises(ValueError, match=message):
        learn(name, small, tokenizer, pairs=pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": LAYERS}, f"layer {LAYERS} does not exist"),
        ({"layer": -1}, "layer -1 does not exist"),
    ],
)
def test_layers_that_are_not_there_are_refused(small, tokenizer, change, message):
    for name in LEARNERS:
        with pytest.raises(ValueError, match=message):
            learn(name, small, tokenizer, **change)


@pytest.mark.parametrize(
    ("learner", "settings", "message"),
    [
        (learn_likelihood_vector, {"suppress": -1}, "0 or more as suppress"),
        (learn_bipo_vector, {"beta": 0}, "a beta above 0"),
        (learn_bipo_vector, {"beta": math.nan}, "a finite number as beta"),
        (learn_reft_r1, {"top_k": 0}, "1 or more as top_k"),
        (learn_reft_r1, {"sparsity": -0.1}, "0 or more as sparsity"),
    ],
)
def test_numbers_out_of_range_are_refused(small, tokenizer, learner, settings, message):
    with pytest.raises(ValueError, match=message):
        learner(small, tokenizer, PAIRS, LAYER, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0}, {"weight_decay": -1}, {"seed": -1}],
)
def test_a_descent_has_sensible_numbers(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Descent(**settings)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_steered_model_is_refused(small, tokenizer, name):
    with (
        SteeringVector({2: noise(1)}).apply(small),
        pytest.raises(ValueError, match="take the hook off first"),
    ):
        learn(name, small, tokenizer)


# --- the losses ---


def losses_of(task: VectorTask, chosen=(0, 1, 2)):
    """The loss of each method as a function of a vector [d_model]."""
    plain = unsteered_likelihoods(task, 2)
    return {
        "likelihood": lambda v: likelihood_loss(task, v, chosen, 0.0),
        "suppressing": lambda v: likelihood_loss(task, v, chosen, 0.7),
        "bipo": lambda v: bipo_loss(task, v, chosen, [1, -1, 1], plain, 1.0),
        "reft_r1": lambda v: rank_one_loss(task, v, chosen, 2, 0.3),
    }


@pytest.mark.parametrize("name", LEARNERS)
def test_gradient_is_the_finite_difference(task, name):
    """Along itself, where the loss rises fastest, and along two others."""
    loss_of, here = losses_of(task)[name], noise(0)
    vector = here.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(vector), vector)
    assert gradient.norm() > 0.02
    for along in (gradient / gradient.norm(), noise(3), noise(4)):
        step = 0.002 * along
        with torch.no_grad():
            rise = (loss_of(here + step) - loss_of(here - step)) / 0.004
        assert rise.item() == pytest.approx((gradient @ along).item(), rel=0.02, abs=1e-3)


@torch.no_grad()
def test_likelihood_is_that_of_transformers(small, tokenizer, task):
    """Unsteered at 0, each text by itself; negative texts count by -log(1 - p)."""

    def by_hand(side: int, value) -> float:
        means = []
        for pair in PAIRS:
            ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in pair]
            parted = next(at for at, (a, b) in enumerate(zip(*map(torch.flatten, ids))) if a != b)
            logprobs = small(ids[side]).logits[0].double().log_softmax(-1)
            found = [logprobs[at - 1, ids[side][0, at]] for at in range(parted, ids[side].shape[1])]
            means.append(sum(map(value, found)) / len(found))
        return float(sum(means) / len(means))

    zero, chosen = torch.zeros(D_MODEL), range(3)
    positive = by_hand(0, lambda logprob: -logprob)
    negative = by_hand(1, lambda logprob: -torch.log1p(-logprob.exp()))
    assert likelihood_loss(task, zero, chosen, 0.0).item() == pytest.approx(positive, rel=1e-5)
    expected = positive + 2 * negative
    assert likelihood_loss(task, zero, chosen, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_preference_loss_is_the_formula():
    positive, negative = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    signs = torch.tensor([1.0, -1.0])
    margins = [0.2 * (1.0 - 0.5), -0.2 * (-2.0 - 3.0)]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 2
    assert preference_loss(positive, negative, signs, 0.2).item() == pytest.approx(expected)


@torch.no_grad()
def test_bipo_is_the_same_for_swapped_pairs_and_the_opposite_vector(small, tokenizer, task):
    """With every sign turned around; and at 0 nothing is preferred, whatever the signs."""
    swapped = VectorTask(small, tokenizer, [(b, a) for a, b in PAIRS], LAYER, None)
    plain, signs = unsteered_likelihoods(task, 8), [1, 1, -1]
    other, vector = unsteered_likelihoods(swapped, 8), noise(1, 3.0)
    assert torch.equal(plain.flip(0), other)
    found = bipo_loss(task, vector, (0, 1, 2), signs, plain, 1.0)
    opposite = bipo_loss(swapped, -vector, (0, 1, 2), [-sign for sign in signs], other, 1.0)
    torch.testing.assert_close(found, opposite)
    at_zero = bipo_loss(task, 0 * vector, (0, 1, 2), signs, plain, 0.1)
    assert at_zero.item() == pytest.approx(math.log(2), abs=1e-5)
    assert abs(found.item() - math.log(2)) > 5e-2


def test_latents_by_hand():
    """Neither the first token nor padding fires, wherever the padding is."""
    direction = torch.tensor([1.0, 0.0])
    fired = torch.tensor([[9.0, 1.0, -5.0, 2.0, 8.0], [7.0, 6.0, 9.0, 3.0, 4.0]])
    hidden = torch.stack([fired, torch.ones_like(fired)], dim=-1)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    found = latents(hidden, direction, mask, 1)
    assert found.mean.tolist() == [2.0, 4.0] and found.beside.tolist() == [1.0, 3.0]
    found = latents(hidden, direction, mask, 7)  # all of three and of two
    assert found.mean.tolist() == [1.0, 3.5] and found.beside.tolist() == [0.0, 0.0]
    assert latents(hidden[:, :1], direction, mask[:, :1], 1).mean.tolist() == [0.0, 0.0]


@torch.no_grad()
def test_reft_r1_writes_what_it_detects(small, tokenizer, task):
    """At every token of a positive text the mean of the top k along w; the rest costs."""
    direction = noise(2)
    detected = [
        detect_concept(
            small, tokenizer, SteeringVector({LAYER: direction}), [p[side] for p in PAIRS], top_k=k
        )
        for side, k in ((0, 2), (0, 50), (1, 50))
    ]
    texts = [tokenizer(text)["input_ids"] for pair in PAIRS for text in pair]
    lengths = torch.tensor(list(map(len, texts))).view(3, 2) - 1
    with record_activations(small, layer_nums=[LAYER]) as seen:
        free = rank_one_loss(task, direction, range(3), 2, 0.0)
        small(torch.tensor([texts[0]]))
    moved = seen[LAYER][0][0, : len(texts[0])] - seen[LAYER][1][0]
    torch.testing.assert_close(
        moved, (detected[0][0] * direction).expand_as(moved), atol=1e-5, rtol=0
    )
    beside = detected[1] * lengths[:, 0] - 2 * detected[0] + detected[2] * lengths[:, 1]
    found = rank_one_loss(task, direction, range(3), 2, 0.5)
    torch.testing.assert_close(found - free, 0.5 / task.scale * beside.mean())


@torch.no_grad()
def test_detection_is_alike_in_a_batch_and_for_any_length_of_the_vector(small, tokenizer):
    vector, texts = SteeringVector({LAYER: noise(3)}), [text for pair in PAIRS for text in pair]
    together = detect_concept(small, tokenizer, vector, [*texts, "I"], prepend_bos=False)
    alone = [detect_concept(small, tokenizer, 5 * vector, [text]).item() for text in texts]
    assert together.tolist() == pytest.approx([*alone, 0.0], abs=1e-5) and max(alone) > 0
    for text, found in zip(texts, alone):
        with record_activations(small, layer_nums=[LAYER]) as seen:
            small(**tokenizer(text, return_tensors="pt"))
        along = seen[LAYER][0][0, 1:] @ noise(3)
        assert found == pytest.approx(along.clamp(min=0).max().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("vector", "texts", "message"),
    [
        (SteeringVector({0: noise(0), 1: noise(1)}), ["I"], "a vector after one block"),
        (SteeringVector({1: noise(0)}, "mlp"), ["I"], "a vector after one block"),
        (SteeringVector({1: torch.ones(5)}), ["I"], "shape"),
        (SteeringVector({1: noise(0)}), [""], "texts of one token or more"),
        (SteeringVector({1: noise(0)}), "I", "expected a list of prompts"),
    ],
)
def test_what_cannot_be_detected_is_refused(small, tokenizer, vector, texts, message):
    with pytest.raises(ValueError, match=message):
        detect_concept(small, tokenizer, vector, texts)


# --- the descent ---


def test_all_pairs_come_before_one_comes_again():
    seen, learned = [], torch.zeros(1, requires_grad=True)

    def loss_of(chosen, generator):
        seen.append(chosen)
        return (learned - 1).square().sum()

    losses = descend(loss_of, [learned], 5, Descent(steps=5, batch_size=2), "", False)
    order = [number for chosen in seen for number in chosen]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)) and len(losses) == 5
    assert losses == sorted(losses, reverse=True) and order[:5] != order[5:]


def test_steps_get_shorter():
    """The first is as long as the rate, and the last as long as its share that is left."""
    places, learned = [], torch.zeros(1, requires_grad=True)

    def loss_of(chosen, generator):
        places.append(learned.item())
        return -learned.sum()

    descend(loss_of, [learned], 1, Descent(steps=4, learning_rate=0.1), "", False)
    steps = [after - before for before, after in zip(places, [*places[1:], learned.item()])]
    assert steps == pytest.approx([0.1, 0.075, 0.05, 0.025], rel=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_learning_lowers_the_loss_and_the_seed_decides(small, tokenizer, name):
    """Nothing else does: not the modes, gradients, random state or `no_grad` of the caller."""
    vector = learn(name, small, tokenizer)
    first, last = map(float, vector.metadata["loss"].split(" to "))
    assert last < first or name == "bipo"  # which signs were drawn matters there
    torch.manual_seed(7)
    state = torch.get_rng_state()
    small.train()
    small.transformer.h[0].eval()
    with torch.no_grad():
        again = learn(name, small, tokenizer)
    assert small.training and not small.transformer.h[0].training
    small.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vector.layer_activations[LAYER], again.layer_activations[LAYER])
    with torch.inference_mode():
        other = learn(name, small, tokenizer, Descent(4, 2, 0.02, seed=1))
    assert not torch.equal(vector.layer_activations[LAYER], other.layer_activations[LAYER])
    assert not vector.layer_activations[LAYER].requires_grad
    expected = {"pairs": "3", "steps": "4", "seed": "0", "model_type": "gpt2"}
    assert expected.items() <= vector.metadata.items()


def margins(model, tokenizer, vector: SteeringVector, multiplier: float) -> torch.Tensor:
    """How much steering raises the log-likelihood of the positive over the negative texts."""
    task = VectorTask(model, tokenizer, PAIRS, LAYER, None)
    with torch.no_grad():
        plain = unsteered_likelihoods(task, 8)
        with vector.apply(model, multiplier=multiplier):
            steered = unsteered_likelihoods(task, 8)
    return (steered - plain)[0] - (steered - plain)[1]


@pytest.mark.parametrize("name", ["suppressing", "bipo"])
def test_what_was_learned_steers(small, tokenizer, name):
    """At multiplier 1 the pairs move toward their positive texts; BiPO's turns around with it."""
    vector = learn(name, small, tokenizer, Descent(steps=20, batch_size=3, learning_rate=0.02))
    assert margins(small, tokenizer, vector, 1.0).mean() > 0.1
    if name == "bipo":
        assert (margins(small, tokenizer, vector, 1.0) > 0).all()
        assert (margins(small, tokenizer, vector, -1.0) < 0).all()


def test_reft_r1_is_as_long_as_the_most_that_was_detected(small, tokenizer):
    vector = learn("reft_r1", small, tokenizer)
    found = detect_concept(small, tokenizer, vector, [pair[0] for pair in PAIRS], top_k=2)
    assert vector.norm()[LAYER] == pytest.approx(found.max().item(), rel=1e-5)


@torch.no_grad()
def test_the_first_step_is_a_share_of_the_hidden_states(small, tokenizer):
    """Each number moves by the rate times what a number of a median hidden state is."""
    lengths = []
    for positive, _ in PAIRS:
        with record_activations(small, layer_nums=[LAYER]) as seen:
            small(**tokenizer(positive, return_tensors="pt"))
        lengths += seen[LAYER][0][0].norm(dim=-1).tolist()
    median = torch.tensor(lengths).median()
    vector = learn("likelihood", small, tokenizer, Descent(1, 3, learning_rate=0.02))
    moved = vector.layer_activations[LAYER].abs()
    expected = 0.02 * median / D_MODEL**0.5
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-3, atol=0)


def test_the_length_of_hidden_states_sets_the_length_of_the_steps(tokenizer):
    """A stream that is 8 times as long, which every layer norm takes back, gets 8 times as much."""
    learned = []
    for factor in (1.0, 8.0):
        model = tiny_model("GPT-2", len(tokenizer))
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith((".wte.weight", ".wpe.weight")) or ".c_proj." in name:
                    weight.mul_(factor)
        learned.append(learn("likelihood", model, tokenizer).layer_activations[LAYER])
    torch.testing.assert_close(learned[1], 8 * learned[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", LEARNERS)
def test_an_error_leaves_the_model_as_it_was(small, tokenizer, name, error):
    """In the middle of the third step; the hook that raises is not on a block."""
    before, calls = snapshot(small), []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 5:
            raise error

    handle = small.lm_head.register_forward_hook(fail)
    try:
        with pytest.raises(error):
            learn(name, small, tokenizer, Descent(steps=9))
    finally:
        handle.remove()
    assert_pristine(small, before)
    assert all(weight.requires_grad for weight in small.parameters()) and torch.is_grad_enabled()


def test_steps_that_are_too_long_are_named(tokenizer):
    model = tiny_model("GPT-2", len(tokenizer))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        learn("likelihood", model, tokenizer)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_model_in_16_bit_teaches_a_vector_in_32(tokenizer, name):
    """In which steps that are shorter than its rounding still add up."""
    model = tiny_model("Llama", len(tokenizer)).bfloat16()
    before = snapshot(model)
    vector = learn(name, model, tokenizer)
    assert vector.layer_activations[LAYER].dtype == torch.float32
    assert torch.isfinite(vector.layer_activations[LAYER]).all()
    assert_pristine(model, before)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *(ODD | RECURRENT)])
def test_every_architecture_learns(tokenizer, architecture):
    """Positive texts are likelier under the vector than without, and weights keep no gradient."""
    model = tiny_model(architecture, len(tokenizer))
    before = snapshot(model)
    descent = Descent(steps=3, batch_size=3, learning_rate=0.005)
    vector = learn("likelihood", model, tokenizer, descent)
    task = VectorTask(model, tokenizer, PAIRS, LAYER, None)
    with torch.no_grad():
        steered = likelihood_loss(task, vector.layer_activations[LAYER], range(3), 0.0)
        plain = likelihood_loss(task, torch.zeros(D_MODEL), range(3), 0.0)
    assert steered < plain
    assert_pristine(model, before)
    assert all(weight.grad is None for weight in model.parameters())
