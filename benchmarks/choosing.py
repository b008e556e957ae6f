"""How often `choose` takes a bad vector for a good one, or finds a good one, and its time.

    python -m benchmarks.choosing [--seeds 20] [--part rates|times]

prints tables and writes `results/choosing.json`. Rates are those of the embedded model: vectors of
good pairs; of the same pairs with sides swapped at random; of texts that are positive or negative
by lot, each beside each; and of sentences that have nothing in common. Each seed draws pairs,
splits and controls of its own. Times are those of the budget "minutes": on the embedded model, and
on random weights in the shape of the smallest GPT-2.
"""

import argparse
import datetime
import itertools
import random
import time
from typing import Any

import torch
from scipy import stats

from benchmarks.shapes import random_gpt2, random_pairs, word_tokenizer
from benchmarks.stored import machine, machine_line, store_part
from common.choosing.choose import choose
from common.choosing.trying import Budget
from common.loading import load_model
from common.measuring.logit_metrics import ab_metric
from common.measuring.tone import tone_sign
from common.texts.sampling import Sampling
from embedded_model import grammar, vocabulary
from embedded_model.prompts import NEW_PROMPTS, OUTSIDE_PROMPTS, TABLE_PROMPTS

KINDS = ("good", "swapped", "crossed", "unrelated")
PROMPTS = [*NEW_PROMPTS, *TABLE_PROMPTS, *OUTSIDE_PROMPTS]
# A choice among several settings, small enough to be made many times.
BUDGET = Budget(
    layers=3,
    strengths=(0.3, 1.0),
    prompts=12,
    calibrating=2,
    instructions=0,
    sampling=Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9),
)
COUNT = 24  # pairs


def pairs_of(kind: str, seed: int) -> list[tuple[str, str]]:
    """Return pairs of a kind."""
    draw = random.Random(seed)
    if kind == "unrelated":
        _, sentences = grammar.topic_sentences(seed=444_200_000 + seed, on=0, off=2 * COUNT)
        draw.shuffle(sentences)
        return list(zip(sentences[::2], sentences[1::2]))
    if kind == "crossed":
        texts = [side for pair in grammar.contrast_pairs(8, seed=seed) for side in pair]
        draw.shuffle(texts)
        return list(itertools.product(texts[:8], texts[8:]))
    pairs = grammar.contrast_pairs(COUNT, seed=seed)
    if kind == "swapped":
        return [pair if draw.random() < 0.5 else pair[::-1] for pair in pairs]
    return pairs


def rates(seeds: int, of: str) -> dict[str, Any]:
    """Return by kind how many of so many vectors passed as better than random, and what failed."""
    model, tokenizer, _ = load_model("embedded")
    metric: Any = tone_sign
    if of == "next token":
        words = [vocabulary.ADJECTIVES[tone] for tone in (+1, -1)]
        metric = ab_metric(tokenizer, *words)
    found: dict[str, Any] = {}
    for kind in KINDS:
        cards = []
        for seed in range(seeds):
            pairs = pairs_of(kind, seed)
            others = {"other_texts": PROMPTS[:4], "show_progress": False}
            given = (pairs, PROMPTS, metric, BUDGET)
            cards.append(choose(model, tokenizer, *given, seed=seed, **others).card)
        passed = sum(card.better for card in cards)
        interval = stats.binomtest(passed, seeds).proportion_ci(0.95, "wilson")
        each = {
            str(card["question"]): sum(one.judged[n]["passed"] for one in cards)
            for n, card in enumerate(cards[0].judged)
        }
        found[kind] = {
            "vectors": seeds,
            "better": passed,
            "low": interval.low,
            "high": interval.high,
            "each test": each,
        }
        print(f"{of}, {kind}: {passed} of {seeds} better than random; {each}", flush=True)
    return found


def times() -> dict[str, float]:
    """Return the seconds that the budget "minutes" takes, by model."""
    found = {}
    model, tokenizer, _ = load_model("embedded")
    given = (pairs_of("good", 0), PROMPTS, tone_sign)
    found["embedded"] = _seconds(model, tokenizer, given)
    model, tokenizer = random_gpt2("gpt2-small"), word_tokenizer()
    # With embeddings as small as drawn, no steering moves the predictions by a nat.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    drawn = [text for pair in random_pairs(COUNT + len(PROMPTS), 8) for text in pair]
    pairs = list(zip(drawn[: 2 * COUNT : 2], drawn[1 : 2 * COUNT : 2]))
    given = (pairs, drawn[2 * COUNT :][: len(PROMPTS)], lambda texts: [len(text) for text in texts])
    found["gpt2-small"] = _seconds(model, tokenizer, given)
    return found


def _seconds(model: Any, tokenizer: Any, given: tuple) -> float:
    begun = time.perf_counter()
    choose(model, tokenizer, *given)
    seconds = time.perf_counter() - begun
    print(f"{model.config.num_hidden_layers} blocks: {seconds:.0f} s", flush=True)
    return seconds


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--part", choices=("rates", "times"))
    arguments = parser.parse_args()
    about = {"measured": datetime.date.today().isoformat(), "machine": machine()}
    print(machine_line(about))
    if arguments.part != "times":
        found = {of: rates(arguments.seeds, of) for of in ("next token", "completions")}
        store_part("rates", {**about, "budget": repr(BUDGET), **found}, {}, "choosing")
    if arguments.part != "rates":
        store_part("times", {**about, "seconds": times()}, {}, "choosing")


if __name__ == "__main__":
    main()
