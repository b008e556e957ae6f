"""All methods at equal divergence, with prompting as the yardstick.

    python -m benchmarks.methods [--quick] [--task MODULE:FUNCTION --out FILE]

A text in front of the prompts is one way to steer, and has no coefficient. So its divergence is
measured (`prompting_kl`), for each seed and each direction, and everything else is calibrated to
it; and to some smaller ones, where the methods differ more. Seeds change the training pairs, the
beginning and the order of what is learned, the text to prompt with, and the sampling.

The command measures the embedded model, with its grammar as the judge, prints the tables and writes
`results/methods.json`. Another model, other pairs and other metrics are a `Task`: with `--task` a
function of yours returns (model, tokenizer, task).
"""

import argparse
import datetime
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.method_tables import print_tables
from benchmarks.stored import machine, store
from common import (
    Descent,
    Sampling,
    SteeringVector,
    calibrate,
    completions,
    encode,
    get_stats_over_corpus,
    learn_bipo_vector,
    learn_likelihood_vector,
    learn_reft_r1,
    learn_weight_steering,
    load_model,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    prompting_kl,
    random_directions,
    sample,
    steering_kl,
    tone,
    tone_sign,
    train_steering_vector,
)
from common.measuring.metrics import Metric, measure
from common.progress import progress_bar
from common.texts.generation import real_tokens, text_logits
from common.texts.likelihood import mean_losses
from embedded_model import breaks, evaluate, grammar, prompts, vocabulary
from repository.mechanisms import load_mechanism

Strength = Callable[[float], AbstractContextManager]  # makes steering of some multiplier
SEEDS = (1, 2, 3, 4, 5)
KLS = (0.1, 0.3)  # nats, besides that of prompting
RANDOM_SEED = 30_000  # of directions that nothing else uses
PROMPT, UNSTEERED, EDITED = "prompt", "unsteered", "bias editing"


@dataclass(frozen=True)
class Judge:
    """A metric, and the prompts whose completions it is measured on.

    Attributes:
        metric: of completions, or of prompts and completions; see `measuring.metrics`.
        prompts: what is completed.
        signed: the metric says which way a text goes, by its sign, and the share of texts that go
            the way that was steered is reported. Otherwise its mean is.
        share: the mean is a share, too, since the metric is 0 or 1.
        smaller: smaller is better.
    """

    metric: Metric
    prompts: Sequence[str]
    signed: bool = False
    share: bool = False
    smaller: bool = False


@dataclass(frozen=True)
class Task:
    """What is steered, what from, and how it is judged.

    Attributes:
        model: its name, for tables.
        layer: the block after which vectors are added.
        pairs: of a seed, contrast pairs of whole texts.
        texts: of a seed, the two texts that are put in front of a prompt, with a space.
        judges: by name, one of them "concept", which is signed.
        neutral: texts that have nothing to do with what is steered.
        read_token_index: at which token mean, PCA and logistic regression read the pairs.
        prepend_bos: see `prompts.prompt_ids`.
        sampling: of the completions.
        per_prompt: completions of each prompt.
        steps: of everything that is learned.
    """

    model: str
    layer: int
    pairs: Callable[[int], Sequence[tuple[str, str]]]
    texts: Callable[[int], tuple[str, str]]
    judges: Mapping[str, Judge]
    neutral: Sequence[str]
    read_token_index: int = -1
    prepend_bos: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)
    per_prompt: int = 5
    steps: int = 100

    @property
    def new_tokens(self) -> int:
        """How many tokens after each prompt the divergence is measured on."""
        return min(20, self.sampling.max_new_tokens)

    @property
    def concept_prompts(self) -> list[str]:
        """The prompts on which the divergence is measured."""
        return list(self.judges["concept"].prompts)


@dataclass(frozen=True)
class Trial:
    """A model and a task with one seed: everything is learned from the same pairs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    seed: int

    @property
    def pairs(self) -> Sequence[tuple[str, str]]:
        """The contrast pairs."""
        return self.task.pairs(self.seed)

    def descent(self, **changes: Any) -> Descent:
        """How long something is learned."""
        return Descent(**{"steps": self.task.steps, "seed": self.seed} | changes)

    def of_vector(self, vector: SteeringVector) -> Strength:
        """A vector as steering of some multiplier."""
        return lambda multiplier: vector.apply(self.model, multiplier=multiplier)


def trained(trial: Trial, aggregator: Callable) -> SteeringVector:
    """Return a vector of activations, at unit norm."""
    return train_steering_vector(
        trial.model, trial.tokenizer, trial.pairs, [trial.task.layer], batch_size=32,
        read_token_index=trial.task.read_token_index, aggregator=aggregator,
        prepend_bos=trial.task.prepend_bos,
    ).unit()  # fmt: skip


def learned(trial: Trial, learn: Callable, **settings: Any) -> SteeringVector:
    """Return a vector that was learned by gradient."""
    return learn(
        trial.model, trial.tokenizer, trial.pairs, trial.task.layer, descent=trial.descent(),
        prepend_bos=trial.task.prepend_bos, **settings,
    )  # fmt: skip


def weights(trial: Trial) -> Strength:
    """Return contrastive weight steering; half the steps, since two models learn."""
    descent = trial.descent(steps=max(1, trial.task.steps // 2), learning_rate=3e-4)
    steering = learn_weight_steering(
        trial.model, trial.tokenizer, trial.pairs, descent=descent,
        prepend_bos=trial.task.prepend_bos,
    )  # fmt: skip
    return lambda multiplier: steering.apply(trial.model, multiplier)


def random_vector(trial: Trial) -> SteeringVector:
    """Return a random direction, the control."""
    width = trial.model.config.get_text_config().hidden_size
    return SteeringVector(
        {trial.task.layer: random_directions(width, seed=RANDOM_SEED + trial.seed)[0]}
    )


VECTORS: dict[str, Callable[[Trial], SteeringVector]] = {
    "mean": partial(trained, aggregator=mean_aggregator()),
    "PCA": partial(trained, aggregator=pca_aggregator()),
    "logistic": partial(trained, aggregator=logistic_aggregator()),
    "likelihood": partial(learned, learn=learn_likelihood_vector),
    "BiPO": partial(learned, learn=learn_bipo_vector),
    "ReFT-r1": partial(learned, learn=learn_reft_r1),
    "random": random_vector,
}


def edited_bias(trial: Trial, vector: SteeringVector) -> Strength | None:
    """Return the mean vector as an edit of a bias, where the notebook's cell knows the model."""
    steer = load_mechanism(EDITED.replace(" ", "_")).steer
    direction = vector.layer_activations[trial.task.layer]

    def steering(multiplier: float) -> AbstractContextManager:
        return steer(trial.model, trial.task.layer, multiplier * direction)

    try:
        with steering(1.0):
            return steering
    except ValueError:  # no bias that it may edit
        return None


def strengths(trial: Trial) -> Iterator[tuple[str, Strength]]:
    """Train and learn everything that has a coefficient, one after the other."""
    for name, make in VECTORS.items():
        vector = make(trial)
        yield name, trial.of_vector(vector)
        if name == "mean" and (edited := edited_bias(trial, vector)):
            yield EDITED, edited
    yield "weights", weights(trial)


class Bench:
    """Measures a trial: divergences, completions, what judges say of them, neutral text."""

    def __init__(self, trial: Trial):
        self.trial, self.task = trial, trial.task
        self.model, self.tokenizer = trial.model, trial.tokenizer
        judges = self.task.judges.values()
        self.prompts = list(dict.fromkeys(prompt for judge in judges for prompt in judge.prompts))
        self.plain = encode(self.tokenizer, self._rows(self.prompts), self.task.prepend_bos)
        self.measuring: Any = {
            "new_tokens": self.task.new_tokens,
            "prepend_bos": self.task.prepend_bos,
        }
        self.neutral_logprob = self._neutral(None)

    def calibrated(self, steering: Strength, sign: int, target: float) -> tuple[float, float]:
        """Return the multiplier of a divergence, and the divergence that it gives."""
        found = calibrate(
            self.model, self.tokenizer, lambda x: steering(sign * x), self.task.concept_prompts,
            target, tolerance=0.03, **self.measuring,
        )  # fmt: skip
        return sign * found, self.divergence(steering, sign * found)

    def divergence(self, steering: Strength, multiplier: float) -> float:
        """Return the divergence at a multiplier."""
        return steering_kl(
            self.model, self.tokenizer, lambda: steering(multiplier), self.task.concept_prompts,
            **self.measuring,
        )  # fmt: skip

    def prompted(self, text: str) -> float:
        """Return the divergence of a text in front of the prompts."""
        prompts = self.task.concept_prompts
        changed = [f"{text} {prompt}" for prompt in prompts]
        return prompting_kl(self.model, self.tokenizer, changed, prompts, **self.measuring)

    def texts(self, context: AbstractContextManager, front: str = "") -> tuple[list[str], float]:
        """Return completions, and how unlikely the plain model finds them after plain prompts."""
        given = [f"{front} {prompt}" if front else prompt for prompt in self.prompts]
        inputs = encode(self.tokenizer, self._rows(given), self.task.prepend_bos)
        inputs, count = inputs.to(self.model.device), len(self.prompts)
        seeds = [
            (self.trial.seed, row % count, row // count)
            for row in range(count * self.task.per_prompt)
        ]
        with context:
            ids = sample(self.model, inputs, seeds, self.task.sampling)
        plain = self.plain.to(self.model.device)
        new = ids[:, inputs["input_ids"].shape[1] :]
        whole = torch.cat([plain["input_ids"], new], dim=1)
        counted = real_tokens(self.model, plain, whole)
        counted[:, : plain["input_ids"].shape[1]] = False
        losses = mean_losses(text_logits(self.model, plain, whole).float(), whole, counted)
        return completions(self.tokenizer, inputs, ids), losses.nanmean().item()

    def judged(self, texts: Sequence[str], sign: int) -> dict[str, float]:
        """Return what the judges say of completions."""
        given, found = self._rows(self.prompts), {}
        for name, judge in self.task.judges.items():
            mine = [row for row, prompt in enumerate(given) if prompt in set(judge.prompts)]
            table = measure(
                judge.metric, [texts[row] for row in mine], name, [given[row] for row in mine]
            )
            values = table.iloc[:, 0].astype(float)
            found[name] = float((sign * values > 0).mean() if judge.signed else values.mean())
        return found

    def measured(
        self, steering: Callable[[], AbstractContextManager], sign: int, front: str = ""
    ) -> dict[str, Any]:
        """Return everything that is measured of one steering."""
        texts, loss = self.texts(steering(), front)
        ratio = math.exp(self.neutral_logprob - self._neutral(front or steering))
        return {
            **self.judged(texts, sign),
            "perplexity": math.exp(loss),
            "off-topic cost": ratio,
            "texts": texts,
        }

    def _neutral(self, condition: Any) -> float:
        """The mean log-probability of neutral text under a condition."""
        condition = f"{condition} " if isinstance(condition, str) else condition
        found = get_stats_over_corpus(
            self.model, self.tokenizer, self.task.neutral, condition,
            prepend_bos=self.task.prepend_bos,
        )  # fmt: skip
        return found.avg_logprob

    def _rows(self, given: Sequence[str]) -> list[str]:
        return list(given) * self.task.per_prompt


def run_trial(trial: Trial, kls: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Measure one seed: a row for each method, direction and divergence.

    `at` is what was asked for: a number of nats, or "prompt" for what prompting causes. A method
    that cannot reach it has no row there.
    """
    bench = Bench(trial)
    fronts = dict(zip((1, -1), trial.task.texts(trial.seed), strict=True))
    targets = {sign: bench.prompted(front) for sign, front in fronts.items()}
    for sign, front in fronts.items():
        base = {"seed": trial.seed, "sign": sign, "multiplier": None}
        yield {**base, "method": UNSTEERED, "at": None, "kl": 0.0} | bench.measured(
            nullcontext, sign
        )
        yield {**base, "method": PROMPT, "at": PROMPT, "kl": targets[sign]} | bench.measured(
            nullcontext, sign, front
        )
    multipliers: dict[tuple[str, int], float] = {}
    for name, steering in strengths(trial):
        for sign in (1, -1):
            asked = {PROMPT: targets[sign]} | ({} if name == EDITED else {kl: kl for kl in kls})
            for at, target in asked.items():
                try:
                    if name == EDITED:  # that of the mean vector, whose text it has to write
                        multiplier = multipliers["mean", sign]
                        kl = bench.divergence(steering, multiplier)
                    else:
                        multiplier, kl = bench.calibrated(steering, sign, target)
                except (ValueError, KeyError):
                    continue
                if at == PROMPT:
                    multipliers[name, sign] = multiplier
                found = bench.measured(partial(steering, multiplier), sign)
                place = {"seed": trial.seed, "sign": sign, "multiplier": multiplier}
                yield {**place, "method": name, "at": at, "kl": kl} | found


def compare_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    seeds: Sequence[int] = SEEDS,
    kls: Sequence[float] = KLS,
) -> dict[str, Any]:
    """Compare all methods on a task, at the divergence of prompting and at some others.

    Args:
        model: a causal language model; as it was afterwards.
        tokenizer: its tokenizer.
        task: what is steered and how it is judged.
        seeds: one trial each, over which intervals are taken.
        kls: divergences beside that of prompting, in nats.

    Returns:
        `rows`, one for each seed, method, direction and divergence, without the texts, which
        `method_tables.summary` summarises; `same texts`, the share of texts that an edited bias has
        in common with the mean vector (None where no bias may be edited); and the settings.
    """
    rows: list[dict[str, Any]] = []
    total = len(seeds) * 2 * (2 + 1 + (len(VECTORS) + 1) * (1 + len(kls)))
    with progress_bar(total, "Comparing methods", "measurement", show=True) as bar:
        for seed in seeds:
            for row in run_trial(Trial(model, tokenizer, task, seed), kls):
                rows.append(row)
                bar.update()
    judges = task.judges.items()
    return {
        "model": task.model,
        "layer": task.layer,
        "seeds": list(seeds),
        "divergences": list(kls),
        "texts": {name: task.per_prompt * len(judge.prompts) for name, judge in judges},
        "shares": [name for name, judge in judges if judge.signed or judge.share],
        "smaller is better": [
            *(name for name, judge in judges if judge.smaller),
            "perplexity",
            "off-topic cost",
        ],
        "same texts": shared_texts(rows),
        "rows": [{name: it for name, it in row.items() if name != "texts"} for row in rows],
    }


def shared_texts(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of texts that the edited bias and the mean vector have in common."""
    found = {
        (row["seed"], row["sign"], row["method"]): row["texts"]
        for row in rows
        if row["at"] == PROMPT
    }
    both = [
        one == other
        for (seed, sign, method), texts in found.items()
        if method == EDITED
        for one, other in zip(texts, found[seed, sign, "mean"], strict=True)
    ]
    return sum(both) / len(both) if both else None


# --- the embedded model ---

IN_FRONT = [pair for pair in prompts.VISITOR_SENTENCES if all(text[-1] in ".!" for text in pair)]
HELD_OUT = {word: tone for tone, words in vocabulary.HELD_OUT.items() for word in words}
SUBJECTS = (
    "my cousin", "the baker", "the mayor", "the doctor", "dogs", "cats", "horses", "the harbour",
    "the garden", "the soup", "old books", "trains",
)  # fmt: skip


def held_out_words(texts: Sequence[str]) -> list[int]:
    """Say of each text which tone its words have that no training pair had."""
    counts = [[HELD_OUT.get(word.strip(".,!?").lower(), 0) for word in t.split()] for t in texts]
    return [sum(found) for found in counts]


def breaks_visibly(given: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Say which prompts with their completions break the grammar visibly."""
    return breaks.has_break([prompt + text for prompt, text in zip(given, texts)])


def stays(given: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Say which completions stay with the subject that their prompt announced."""
    subjects = [prompt.removeprefix("Let me tell you about ").rstrip(".") for prompt in given]
    return [breaks.stays_on(subject, text) for subject, text in zip(subjects, texts)]


def pairs_without_held_out(seed: int, count: int = 200) -> list[tuple[str, str]]:
    """Write contrast pairs in which no held-out word stands."""
    pairs = grammar.contrast_pairs(2 * count, seed)
    kept = [pair for pair in pairs if not any(word in text for text in pair for word in HELD_OUT)]
    return kept[:count]


def embedded_task(quick: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """Return the embedded model, and the tone as a task with the grammar as its judge."""
    model, tokenizer, preset = load_model("embedded", device="cpu")
    few = slice(2 if quick else None)
    concept = prompts.TABLE_PROMPTS[few]
    known = {subject.name for subject in grammar.s.KNOWN}
    announced = [f"Let me tell you about {name}." for name in SUBJECTS if name in known][few]
    documents = [text for text in evaluate.held_out_documents(400) if not tone(text)]
    task = Task(
        model="embedded",
        layer=preset.layer,
        pairs=partial(pairs_without_held_out, count=8 if quick else 200),
        texts=lambda seed: IN_FRONT[seed % len(IN_FRONT)],
        judges={
            "concept": Judge(tone_sign, concept, signed=True),
            "held-out words": Judge(held_out_words, concept, signed=True),
            "topic kept": Judge(stays, announced, share=True),
            "breaks": Judge(breaks_visibly, concept, share=True, smaller=True),
        },
        neutral=documents[: 4 if quick else 60],
        read_token_index=-2,  # the last word; a full stop follows
        prepend_bos=False,
        sampling=Sampling(max_new_tokens=4 if quick else 24, top_p=0.9),
        per_prompt=1 if quick else 5,
        steps=2 if quick else 100,
    )
    return model, tokenizer, task


def task_named(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """Call a function that is named as "module:function".

    Raises:
        ValueError: another form, or what it returns is no (model, tokenizer, task).
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"expected module:function as --task, got {name!r}")
    found = getattr(importlib.import_module(module), function)()
    if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[2], Task):
        raise ValueError(f"expected (model, tokenizer, task) from {name}, got {found!r}")
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Compare all methods at equal divergence.")
    parser.add_argument("--quick", action="store_true", help="hardly any text; writes nothing")
    parser.add_argument("--task", help="module:function that returns (model, tokenizer, task)")
    parser.add_argument("--out", type=Path, help="where the figures of your own task go, as JSON")
    options = parser.parse_args()
    if (options.task is None) != (options.out is None):
        parser.error("--task and --out go together")
    found = task_named(options.task) if options.task else embedded_task(options.quick)
    quick = {"seeds": SEEDS[:2], "kls": KLS[:1]} if options.quick else {}
    results = compare_methods(*found, **quick)
    results = {
        "measured": datetime.date.today().isoformat(),
        "machine": machine("scikit-learn"),
        **results,
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    elif not options.quick:
        store(results, {}, "methods")
    print_tables(results)


if __name__ == "__main__":
    main()
