"""The comparison of methods: equal is equal, a rank needs intervals, any model takes part."""

import math
import sys
import types

import pytest
import torch
from architectures import tiny_model
from scipy import stats

from benchmarks import methods
from benchmarks.method_tables import (
    interval,
    parted,
    places,
    plot_by_divergence,
    plot_measures,
    print_tables,
    ranks,
    summary,
    table,
)
from benchmarks.methods import Judge, Task, Trial, compare_methods, embedded_task, run_trial
from benchmarks.stored import load
from common import Sampling, tone_sign
from common.checking.pristine import assert_pristine, snapshot


def small_task(**changes) -> Task:
    given = {
        "model": "tiny",
        "layer": 1,
        "pairs": lambda seed: [
            ("I am glad", "I am sad and ill"),
            ("You are kind", "You are cruel"),
        ],
        "texts": lambda seed: ("Love.", "Hate."),
        "judges": {
            "concept": Judge(tone_sign, ["I think dogs are", "You"], signed=True),
            "length": Judge(lambda given, texts: [len(t) for t in texts], ["You", "The old"]),
        },
        "neutral": ["The harbour has two piers."],
        "sampling": Sampling(max_new_tokens=2),
        "per_prompt": 1,
        "steps": 2,
    }
    return Task(**given | changes)


@pytest.fixture(scope="module")
def results(tokenizer):
    """Of a tiny Llama, with metrics of its own; the model is as it was afterwards."""
    model = tiny_model("Llama", len(tokenizer))
    before = snapshot(model)
    found = compare_methods(model, tokenizer, small_task(), seeds=(1, 2), kls=(0.01,))
    assert_pristine(model, before)
    return found


def test_every_method_is_there_and_equally_strong(results):
    """But for what cannot reach it, which has no row; prompting sets the divergence."""
    rows = results["rows"]
    names = {"unsteered", "prompt", "bias editing", "weights", *methods.VECTORS}
    assert {row["method"] for row in rows} <= names
    assert {"unsteered", "prompt", "mean", "weights"} <= {row["method"] for row in rows}
    target = {(row["seed"], row["sign"]): row["kl"] for row in rows if row["method"] == "prompt"}
    assert len(target) == 4
    for row in rows:
        if row["at"] == "prompt":
            assert row["kl"] == pytest.approx(target[row["seed"], row["sign"]], rel=0.031)
        elif row["at"] is not None:
            assert row["kl"] == pytest.approx(row["at"], rel=0.031)
        if row["multiplier"] is not None:
            assert math.copysign(1, row["multiplier"]) == row["sign"]


def test_an_edited_bias_is_the_mean_vector(results):
    """The same multiplier gives the same divergence, the same texts and whatever is measured."""
    assert results["same texts"] == 1
    found: dict[str, list[dict]] = {"mean": [], "bias editing": []}
    for row in results["rows"]:
        if row["method"] in found and row["at"] == "prompt":
            numbers = {name: it for name, it in row.items() if name not in ("method", "at")}
            found[row["method"]].append(numbers)
    assert len(found["bias editing"]) == 4
    for mean, edited in zip(*found.values(), strict=True):
        assert edited == pytest.approx(mean, rel=1e-4)


def test_metrics_of_a_task_are_measured_on_its_prompts(tokenizer):
    """A share of the texts that go the steered way, or a mean; prompts are handed on."""
    seen = []

    def metric(given, texts):
        seen.append(given)
        return [1 if prompt == "You" else -2 for prompt in given]

    judges = {
        "concept": Judge(metric, ["You", "I", "The"], signed=True),
        "mean": Judge(metric, ["I"]),
    }
    model = tiny_model("GPT-2", len(tokenizer))
    trial = Trial(model, tokenizer, small_task(judges=judges, per_prompt=2), 1)
    bench = methods.Bench(trial)
    texts = [str(number) for number in range(6)]
    assert bench.judged(texts, 1) == {"concept": pytest.approx(1 / 3), "mean": -2}
    assert bench.judged(texts, -1) == {"concept": pytest.approx(2 / 3), "mean": -2}
    assert seen[0] == ["You", "I", "The"] * 2 and seen[1] == ["I", "I"]


def test_unsteered_is_the_model_itself(tokenizer):
    """Its neutral text costs nothing; the perplexity is that of its own texts, by transformers."""
    model = tiny_model("GPT-2", len(tokenizer))
    trial = Trial(model, tokenizer, small_task(), 1)
    rows = run_trial(trial, ())
    plain, prompted = next(rows), next(rows)
    assert plain["method"] == "unsteered" and prompted["method"] == "prompt"
    assert plain["off-topic cost"] == 1 and plain["kl"] == 0 and prompted["kl"] > 0
    assert prompted["off-topic cost"] != 1
    losses = []
    prompts = list(dict.fromkeys(["I think dogs are", "You", "The old"]))
    for prompt, text in zip(prompts, plain["texts"]):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.cat([ids, new], dim=1)).logits[0].log_softmax(-1)
        found = logprobs[ids.shape[1] - 1 : -1].gather(-1, new[0, :, None])
        losses.append(-found.mean().item())
        if tokenizer(prompt + text)["input_ids"] != [*ids[0].tolist(), *new[0].tolist()]:
            pytest.skip("the text is cut into other tokens than it was written in")
    assert plain["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)


def test_intervals():
    """Student's t over the seeds; a share is never surer than its texts."""
    mean, low, high = interval([1.0, 2.0, 4.0])
    expected = stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((7 / 3, expected.low, expected.high))
    assert interval([1.0, 1.0, 1.0]) == (1, 1, 1)
    mean, low, high = interval([1.0, 1.0, 1.0], texts=20)
    assert mean == high == 1 and 0.9 < low < 0.95
    wide = interval([0.2, 0.8], texts=20)
    assert wide[1:] == (0, 1) and math.isnan(interval([0.5])[1])


def made_up(**numbers: list[float]) -> dict:
    """Results in which each method has a concept for each seed, both ways."""
    rows = [
        {"seed": seed, "sign": sign, "method": method, "at": "prompt", "kl": 1.0, "multiplier": 1}
        | {"concept": value, "cost": -value}
        for method, values in numbers.items()
        for seed, value in enumerate(values)
        for sign in (1, -1)
    ]
    return {
        "model": "m", "layer": 1, "seeds": [0, 1, 2], "same texts": None, "rows": rows,
        "texts": {"concept": 100}, "shares": [], "smaller is better": ["cost"],
    }  # fmt: skip


def test_a_rank_needs_intervals_that_part():
    results = made_up(
        best=[0.9, 0.91, 0.92], one=[0.5, 0.6, 0.7], other=[0.55, 0.6, 0.66], last=[0.1, 0.11, 0.12]
    )
    found = {(row["method"], row["measure"]): row["rank"] for row in summary(results)}
    expected = {"best": [1, 1], "one": [2, 3], "other": [2, 3], "last": [4, 4]}
    assert {name: found[name, "concept"] for name in expected} == expected
    assert {name: found[name, "cost"] for name in expected} == expected  # smaller is better there
    assert found["best", "kl"] is None
    assert places([2, 3]) == "2 to 3" and places([4, 4]) == "4"
    assert list(ranks(results, "prompt")["concept"]) == ["1", "2 to 3", "2 to 3", "4"]
    one, other = {"low": 1, "high": 2}, {"low": 2, "high": 3}
    assert parted(one, other) == 0 and parted(one, {"low": 2.1, "high": 3}) == -1


def test_a_seed_with_one_direction_does_not_count():
    results = made_up(whole=[0.5, 0.6, 0.7], torn=[0.5, 0.6, 0.7])
    results["rows"].remove(next(row for row in results["rows"] if row["method"] == "torn"))
    found = {row["method"]: row for row in summary(results) if row["measure"] == "concept"}
    assert found["whole"]["seeds"] == 3 and found["torn"]["seeds"] == 2
    assert found["torn"]["mean"] == pytest.approx(0.65)


def test_tables_and_pictures_show_what_was_measured(results, capsys):
    print_tables(results)
    printed = capsys.readouterr().out
    assert "tiny, layer 1" in printed and "weights" in printed and "100.0%" in printed
    whole = table(results, "prompt")
    axes = plot_measures(results).axes
    drawn = [label.get_text() for label in axes[0].get_yticklabels()]
    assert drawn == [name for name in whole.index if name != "unsteered"]
    assert [axis.get_title().split("\n")[0] for axis in axes] == [
        name for name in whole.columns if name != "kl"
    ]
    (axis,) = plot_by_divergence(results).axes
    labels = {text.get_text() for text in axis.get_legend().get_texts()}
    assert "prompt" in labels and "mean" in labels and "unsteered" not in labels


def test_the_stored_figures_are_those_of_a_whole_run():
    """Five seeds, every method, all measures; what prompting reaches is in the file."""
    found = load("methods")
    assert len(found["seeds"]) == 5 and found["model"] == "embedded"
    methods_there = {row["method"] for row in summary(found) if row["at"] == "prompt"}
    assert methods_there == {"prompt", "bias editing", "weights", *methods.VECTORS}
    assert found["same texts"] == 1


def test_what_the_guide_says_is_what_was_measured():
    """Its sentences, in the order in which they stand there."""
    rows = {(row["at"], row["measure"], row["method"]): row for row in summary(load("methods"))}
    at = {
        name: {m: rows["prompt", name, m] for m in methods_of(rows)} for name in measures_of(rows)
    }
    best = {"prompt", "weights", "BiPO", "logistic", "mean", "bias editing", "PCA"}
    lagging = {"ReFT-r1", "likelihood"}
    concept, new = at["concept"], at["held-out words"]
    assert {m for m in concept if concept[m]["mean"] > 0.94} == best
    assert all(parted(concept[m], concept[other]) == 1 for m in best for other in lagging)
    assert all(parted(concept[m], concept["random"]) == 1 for m in best | lagging)
    assert not parted(concept["random"], rows["None", "concept", "unsteered"])
    for method in best - {"prompt", "weights"}:
        assert 0.33 < new[method]["mean"] < 0.39 and not parted(new[method], new["prompt"])
    assert new["weights"]["mean"] < rows["None", "held-out words", "unsteered"]["mean"]
    assert min(row["mean"] for row in at["topic kept"].values()) > 0.85
    assert max(row["mean"] for row in at["breaks"].values()) < 0.04
    likeliest = sorted(at["perplexity"], key=lambda method: at["perplexity"][method]["mean"])[:2]
    assert set(likeliest) == {"prompt", "weights"}
    cost = {method: row["mean"] for method, row in at["off-topic cost"].items()}
    assert round(cost.pop("prompt"), 1) == 1.3 and max(cost.values()) < 1.07
    assert 0 < cost["mean"] - cost["PCA"] < 0.01
    weakest = {
        m: rows["0.1", "concept", m] for m in methods_of(rows) if ("0.1", "concept", m) in rows
    }
    ahead = {m for m, row in weakest.items() if parted(weakest["weights"], row) == 1}
    assert weakest.keys() - ahead == {"weights", "BiPO"}


def methods_of(rows) -> list[str]:
    return [method for at, measure, method in rows if (at, measure) == ("prompt", "concept")]


def measures_of(rows) -> set[str]:
    return {measure for at, measure, _ in rows if at == "prompt"}


def test_the_embedded_task_holds_words_out():
    """No pair has a word that is counted as held out, and announced subjects are the grammar's."""
    _, _, task = embedded_task()
    pairs = task.pairs(1)
    assert len(pairs) == 200 and pairs != task.pairs(2)
    words = {word.strip(".,").lower() for pair in pairs for text in pair for word in text.split()}
    assert not words & methods.HELD_OUT.keys()
    assert methods.held_out_words(["A superb day.", "It is vile, and hideous.", "No."]) == [
        1,
        -2,
        0,
    ]
    assert len(task.judges["topic kept"].prompts) == 12
    given = ["Let me tell you about my cousin."] * 2
    assert methods.stays(given, [" She is here.", " The harbour is old."]) == [True, False]
    assert not any(map(methods.tone, task.neutral)) and len(task.neutral) == 60


def test_a_task_of_your_own_is_named(tokenizer, monkeypatch):
    """By module and function; another form, or a function that returns something else, is not."""
    task = small_task()
    module = types.ModuleType("mine")
    module.task, module.other = (lambda: ("model", tokenizer, task)), (lambda: task)
    monkeypatch.setitem(sys.modules, "mine", module)
    assert methods.task_named("mine:task") == ("model", tokenizer, task)
    with pytest.raises(ValueError, match="expected module:function"):
        methods.task_named("mine.task")
    with pytest.raises(ValueError, match="expected \\(model, tokenizer, task\\) from mine:other"):
        methods.task_named("mine:other")


def test_the_quick_run_has_hardly_any_text():
    _, _, task = embedded_task(quick=True)
    assert len(task.pairs(1)) == 8 and task.steps == 2 and task.sampling.max_new_tokens == 4
    assert sum(len(judge.prompts) for judge in task.judges.values()) == 8
