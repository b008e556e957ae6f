"""Measure the embedded model: can it be steered, by nothing else, and at what price?

    python -m embedded_model.evaluate [--model FOLDER] [--out FILE]
    python -m embedded_model.evaluate --compare FOLDER FOLDER ...

The first prints the table, and writes it as JSON and into the model card. What is sampled is
sampled with five seeds; the JSON has the figures of each. The second puts the tables of models
that were measured beside each other, and writes them into the card and into seeds.json.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    SteeringVector,
    get_word_count_metric,
    get_x_vector,
    load_model,
    perplexity_ratio_by_cell,
    perplexity_ratios,
    random_directions,
    sweep,
    sweep_perplexity,
    tone_sign,
    train_steering_vector,
)
from common.embedded import FOLDER
from common.measuring.metrics import Metric
from embedded_model import breaks, card, grammar, prompts, report, train, vocabulary

NEW_TOKENS = 24
SAMPLING = Sampling(max_new_tokens=NEW_TOKENS, top_p=0.9)
PUBLISHED = Sampling(max_new_tokens=NEW_TOKENS, top_p=0.3, freq_penalty=1.0)
SEEDS = (1, 2, 3, 4, 5)
# Completions of each prompt with each seed.
PER_PROMPT = {"table": 30, "new": 20, "outside": 20, "cousin": 20}
PROMPTS = {
    "table": prompts.TABLE_PROMPTS,
    "new": prompts.NEW_PROMPTS,
    "outside": prompts.OUTSIDE_PROMPTS,
    "cousin": [prompts.COUSIN],
}
CONTROLS_PER_PROMPT = 10  # of the table's prompts, for each control
VISITORS_PER_PROMPT = 2
RANDOM_DIRECTIONS = 40
RANDOM_SEED = 20_000  # of directions that neither training nor choice has seen
VISITOR_PAIRS = {
    "words": prompts.VISITOR_WORDS,
    "words in lower case": [(a.lower(), b.lower()) for a, b in prompts.VISITOR_WORDS],
    "sentences": prompts.VISITOR_SENTENCES,
}
GREEDY_TOKENS = (20, 40)
GREEDY_RANDOMS = 10
HELD_OUT = {"positive": vocabulary.HELD_OUT[+1], "negative": vocabulary.HELD_OUT[-1]}
CORPUS_DOCUMENTS = 40_000
PERPLEXITY_PARTS = 5  # of the held-out documents, for the spread

TOPIC_PAIR = (" weddings", "")
TOPIC_SENTENCES = (800, 1600)  # about weddings, and others
TABLE_TEXTS = 555_000_001  # seed of the documents for the table of perplexities


def train_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positive: str,
    negative: str,
    layers: Sequence[int],
) -> SteeringVector:
    """Return the unit difference of two prompts at their last tokens, without BOS."""
    pairs = [(positive, negative)]
    return train_steering_vector(model, tokenizer, pairs, layers=layers).unit()


def x_vector(
    tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str], coeff: float = 1.0, layer: int = 0
) -> tuple[ActivationAddition, ActivationAddition]:
    """Return an X-vector at resid_pre of `layer`, the shorter prompt padded with spaces."""
    space = tokenizer(" ")["input_ids"][0]
    padding = {"tokenizer": tokenizer, "pad_method": "tokens_right", "custom_pad_id": space}
    return get_x_vector(*pair, coeff, layer, **padding)


def held_out_documents(count: int) -> list[str]:
    """Write documents that no training has seen: their seed is used nowhere else."""
    source = grammar.documents(987_654_321)
    return [next(source) for _ in range(count)]


def is_positive(texts: Sequence[str]) -> list[bool]:
    """Say which texts are more positive than negative."""
    return [sign > 0 for sign in tone_sign(texts)]


def is_negative(texts: Sequence[str]) -> list[bool]:
    """Say which texts are more negative than positive."""
    return [sign < 0 for sign in tone_sign(texts)]


def has_word(*words: str) -> Metric:
    """Return a metric that says which texts have one of the words, in any case."""
    count = get_word_count_metric(words)
    return lambda texts: [number > 0 for number in count(texts)]


class Demonstration(NamedTuple):
    """A prompt, what is added to it, and what is counted in the completions."""

    prompt: str
    pair: tuple[str, str]
    counted: dict[str, Metric]


DEMONSTRATIONS = {
    "love": Demonstration(
        prompts.ADDITION_PROMPTS["love"],
        ("Love", "Hate"),
        {"loving": is_positive, "hating": is_negative},
    ),
    "weddings": Demonstration(
        prompts.ADDITION_PROMPTS["weddings"],
        ("I talk about weddings constantly", "I do not talk about weddings constantly"),
        {"weddings": has_word(*vocabulary.WEDDING_WORDS)},
    ),
    "rome": Demonstration(
        prompts.ADDITION_PROMPTS["rome"],
        ("The Eiffel Tower is in Rome", "The Eiffel Tower is in France"),
        {
            "Rome or Italy": has_word("rome", "italy"),
            "Paris or France": has_word("paris", "france"),
        },
    ),
    "praise": Demonstration(
        prompts.ADDITION_PROMPTS["praise"],
        ("Praise", "Blame"),
        {"loving": is_positive, "hating": is_negative},
    ),
}


def demonstration_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shown: Demonstration,
    texts: Sequence[str],
    layers: Sequence[int],
    coeffs: Sequence[float],
    count: int,
    seed: int,
) -> pd.DataFrame:
    """Sample as in the activation-addition post, with BOS in front.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        shown: what is added and what is counted.
        texts: what is completed; it need not be the prompt of the demonstration.
        layers: at whose resid_pre it is added.
        coeffs: what it is multiplied by.
        count: completions of each text.
        seed: of the sampling.

    Returns:
        One row for each completion, unsteered ones first; what is counted is 1.0 or 0.0.
    """
    grid = Grid({"addition": x_vector(tokenizer, shown.pair)}, layers=layers, coeffs=coeffs)
    rows = sweep(
        model, tokenizer, grid, texts, shown.counted,
        sampling=PUBLISHED, per_prompt=count, seed=seed,
    )  # fmt: skip
    return rows.astype(dict.fromkeys(shown.counted, float))


def demonstration_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shown: Demonstration,
    layer: int,
    coeff: float,
    count: int,
    seed: int,
) -> pd.DataFrame:
    """Show a demonstration at one place.

    Returns:
        The percentage of completions in which each thing is found, and how many different ones
            there are (`distinct`), by kind: "unsteered" and "steering".
    """
    place = [layer], [coeff]
    rows = demonstration_rows(model, tokenizer, shown, [shown.prompt], *place, count, seed)
    kinds = rows.groupby("kind", sort=False)
    shares = 100 * kinds[list(shown.counted)].mean()
    return shares.assign(distinct=kinds["completion"].nunique())


@dataclass
class Bench:
    """A model, and the place and coefficient at which directions are tried on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int
    coeff: float

    def direction(self, positive: str, negative: str) -> SteeringVector:
        """Return the unit difference of two prompts at the layer."""
        return train_direction(self.model, self.tokenizer, positive, negative, [self.layer])

    def randoms(self, count: int) -> dict[str, SteeringVector]:
        """Return random directions at unit norm, by name."""
        drawn = random_directions(self.model.config.hidden_size, count, RANDOM_SEED)
        return {f"random {i + 1}": SteeringVector({self.layer: v}) for i, v in enumerate(drawn)}

    def grid(self, directions: Mapping[str, SteeringVector], *signs: int) -> Grid:
        """Return the directions at the coefficient, at each sign."""
        return Grid(directions, [self.layer], [sign * self.coeff for sign in signs or (+1, -1)])

    def sample(self, grid: Grid, texts: Sequence[str], per_prompt: int, seed: int) -> pd.DataFrame:
        """Sample completions without BOS, with their tone (1, -1 or 0)."""
        return sweep(
            self.model, self.tokenizer, grid, texts, {"tone": tone_sign},
            sampling=SAMPLING, per_prompt=per_prompt, seed=seed, prepend_bos=False,
        )  # fmt: skip


def conditions(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of one direction at both signs: "unsteered", "love" (+c), "hate" (-c)."""
    coeff = rows["coeff"]
    return {"unsteered": rows[coeff == 0], "love": rows[coeff > 0], "hate": rows[coeff < 0]}


def share(rows: pd.DataFrame, sign: int) -> float:
    """Return the percentage of completions with a tone: 1, -1, or 0 for neither."""
    return round(100 * float((rows["tone"] == sign).mean()), 3)


def by_seed(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn one mapping for each seed, nested or not, into one mapping of lists."""
    return {
        name: by_seed([one[name] for one in found])
        if isinstance(value, Mapping)
        else [one[name] for one in found]
        for name, value in found[0].items()
    }


def measure_tone(bench: Bench) -> dict[str, Any]:
    """Measure Love - Hate on the three lists of prompts: tone, held-out words, breaks, subject."""
    grid = bench.grid({"love": bench.direction("Love", "Hate")})
    words = {name: has_word(*found) for name, found in HELD_OUT.items()}
    found = []
    for seed in SEEDS:
        parts = {
            name: conditions(bench.sample(grid, texts, PER_PROMPT[name], seed))
            for name, texts in PROMPTS.items()
        }
        known = {
            name: pd.concat([parts["table"][name], parts["new"][name]]) for name in parts["table"]
        }
        found.append(
            {
                **{
                    part: {
                        name: {"positive": share(rows, +1), "negative": share(rows, -1)}
                        for name, rows in cells.items()
                    }
                    for part, cells in parts.items()
                    if part != "cousin"
                },
                "held_out_words": {
                    name: {what: sum(has(rows["completion"])) for what, has in words.items()}
                    for name, rows in parts["table"].items()
                },
                "breaks": {name: break_share(rows) for name, rows in known.items()},
                "cousin": {name: cousin_share(rows) for name, rows in parts["cousin"].items()},
            }
        )
    return by_seed(found)


def break_share(rows: pd.DataFrame) -> float:
    """Return the percentage of texts, prompts included, that break visibly."""
    texts = (rows["prompt"] + rows["completion"]).tolist()
    return round(100 * sum(breaks.has_break(texts)) / len(texts), 3)


def cousin_share(rows: pd.DataFrame) -> float:
    """Return the percentage of completions of `COUSIN` whose next sentence is about her."""
    texts = rows.loc[rows["prompt"] == prompts.COUSIN, "completion"]
    return 100 * float(np.mean([breaks.stays_on("my cousin", text) for text in texts]))


def measure_controls(bench: Bench) -> dict[str, Any]:
    """Measure how far random directions and unrelated pairs move the positive share, in points.

    The unsteered completions that they are compared with have the same random numbers.
    """
    randoms = bench.randoms(RANDOM_DIRECTIONS)
    pairs = {"-".join(pair): bench.direction(*pair) for pair in vocabulary.PAIRS}
    grid = bench.grid({**randoms, **pairs}, +1)
    moves = []
    for seed in SEEDS:
        rows = bench.sample(grid, prompts.TABLE_PROMPTS, CONTROLS_PER_PROMPT, seed)
        cells = dict(iter(rows.groupby("steering", sort=False)))
        before = share(cells["unsteered"], +1)
        moves.append({name: round(share(cells[name], +1) - before, 3) for name in cells})
    found = by_seed(moves)
    return {
        "random_moves": [found[name] for name in randoms],
        "pair_moves": {name: found[name] for name in pairs},
    }


def measure_visitors(bench: Bench) -> dict[str, Any]:
    """Measure how far a visitor's own pairs move the tone, in points.

    The move of a pair is the mean of two: how much the positive share grows at +c, and the negative
    one at -c.
    """
    found = []
    for seed in SEEDS:
        kinds = {}
        for kind, pairs in VISITOR_PAIRS.items():
            grid = bench.grid({" - ".join(pair): bench.direction(*pair) for pair in pairs})
            rows = bench.sample(grid, prompts.TABLE_PROMPTS, VISITORS_PER_PROMPT, seed)
            cells = dict(iter(rows.groupby("steering", sort=False)))
            plain = cells.pop("unsteered")
            kinds[kind] = {name: round(both_ways(rows, plain), 3) for name, rows in cells.items()}
        found.append(kinds)
    return by_seed(found)


def both_ways(steered: pd.DataFrame, plain: pd.DataFrame) -> float:
    """Return the mean of what +c adds to the positive share and -c to the negative one."""
    up = share(steered[steered["coeff"] > 0], +1) - share(plain, +1)
    down = share(steered[steered["coeff"] < 0], -1) - share(plain, -1)
    return (up + down) / 2


def measure_greedy(bench: Bench) -> dict[str, Any]:
    """Measure greedy texts: how many have the right tone at +c and -c, and none otherwise.

    Random directions are neutral where their texts are; their number is a mean over ten directions.
    """
    love = {"love": bench.direction("Love", "Hate")}
    randoms = bench.grid(bench.randoms(GREEDY_RANDOMS), +1)
    found: dict[str, Any] = {"prompts": len(prompts.GREEDY_PROMPTS)}
    for tokens in GREEDY_TOKENS:
        cells = conditions(greedy_rows(bench, bench.grid(love), tokens))
        random = greedy_rows(bench, randoms, tokens).query("kind != 'unsteered'")
        found[str(tokens)] = {
            "love": int((cells["love"]["tone"] > 0).sum()),
            "hate": int((cells["hate"]["tone"] < 0).sum()),
            "unsteered_neutral": int((cells["unsteered"]["tone"] == 0).sum()),
            "random_neutral": float((random["tone"] == 0).sum() / GREEDY_RANDOMS),
        }
        texts = {name: rows.set_index("prompt")["completion"] for name, rows in cells.items()}
    found["texts"] = {
        prompt: {name: completions[prompt] for name, completions in texts.items()}
        for prompt in prompts.GREEDY_PROMPTS
    }
    return found


def greedy_rows(bench: Bench, grid: Grid, tokens: int) -> pd.DataFrame:
    """Complete the greedy prompts, without BOS, with the tone of each completion."""
    return sweep(
        bench.model, bench.tokenizer, grid, prompts.GREEDY_PROMPTS, {"tone": tone_sign},
        sampling=Sampling(tokens, temperature=0.0), prepend_bos=False,
    )  # fmt: skip


def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grid: Grid, texts: Sequence[str]
) -> dict[str, float]:
    """Measure the price of a direction: perplexity unsteered, and its ratios at +c and -c."""
    losses = sweep_perplexity(model, tokenizer, grid, texts)
    plain = losses[losses["kind"] == "unsteered"]
    unsteered = math.exp(np.average(plain["loss"], weights=plain["tokens"]))
    plus, minus = perplexity_ratio_by_cell(losses)["ratio"].round(5)
    return {"unsteered": round(unsteered, 5), "love": plus, "hate": minus}


def measure_price(bench: Bench, count: int = 400) -> dict[str, Any]:
    """Measure the perplexity of held-out documents, in parts instead of seeds."""
    texts = held_out_documents(count)
    grid = bench.grid({"love": bench.direction("Love", "Hate")})
    parts = [texts[part::PERPLEXITY_PARTS] for part in range(PERPLEXITY_PARTS)]
    found = [measure_perplexity(bench.model, bench.tokenizer, grid, part) for part in parts]
    return {"documents": count, **by_seed(found)}


def measure_additions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    places: dict[str, Any],
    count: int = 100,
) -> dict[str, Any]:
    """Measure parts (b) to (e): activation additions, each at its own place in `places`."""
    result = {}
    for name, shown in DEMONSTRATIONS.items():
        layer, coeff = places[name]["layer"], places[name]["coeff"]
        found = [
            demonstration_shares(model, tokenizer, shown, layer, coeff, count, seed).to_dict()
            for seed in SEEDS
        ]
        result[name] = {
            "prompt": shown.prompt,
            "pair": shown.pair,
            "completions": count,
            "layer": layer,
            "coeff": coeff,
            **by_seed(found),
        }
    return result


def measure_topic(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure part (f), the post's table of perplexities, on text about weddings and on other."""
    on, off = grammar.topic_sentences(TABLE_TEXTS, *TOPIC_SENTENCES)
    conditions = {
        "steering": x_vector(tokenizer, TOPIC_PAIR, place["coeff"], place["layer"]),
        "prompting": TOPIC_PAIR[0],
    }
    found = perplexity_ratios(model, tokenizer, {"on topic": on, "off topic": off}, conditions)
    return found.round(4).to_dict("records")


def search_corpus(seed: int) -> dict[str, int]:
    """Search the training corpus for held-out prompts and for the nouns outside it.

    Returns:
        How many documents were read, and in how many of them each was found.
    """
    streams = train.corpus(seed)
    texts = [next(stream) for stream in streams for _ in range(CORPUS_DOCUMENTS // len(streams))]
    nouns = get_word_count_metric([f"{noun}{end}" for noun in prompts.OUTSIDE for end in ("", "s")])
    return {
        "documents": len(texts),
        "prompts": len({text for _, text in grammar.find_prompts(texts)}),
        "outside": sum(count > 0 for count in nouns(texts)),
    }


def check(folder: Path, out: Path) -> None:
    """Check before the measurement that it can begin, and that its figures can be stored.

    Raises:
        ValueError: a file is not there, the preset is that of other weights, or `out` cannot be
            written.
    """
    card.need(folder, "model.safetensors", "training.json", "preset.json")
    preset = json.loads((folder / "preset.json").read_text(encoding="utf-8"))
    if preset["sha256"] != card.weights_hash(folder):
        raise ValueError(
            f"the preset in {folder} is that of other weights: run embedded_model.choose again"
        )
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"expected a file in a folder that is there as --out, got {out}")


def measure(folder: Path) -> dict[str, Any]:
    """Measure the whole table for the model in a folder, at its preset."""
    model, tokenizer, _ = load_model(str(folder))
    preset = json.loads((folder / "preset.json").read_text(encoding="utf-8"))
    seed = json.loads((folder / "training.json").read_text(encoding="utf-8"))["seed"]
    bench = Bench(model, tokenizer, preset["layer"], preset["coeff"])
    places = {key: preset[key] for key in ("layer", "coeff", "activation_additions", "topic")}
    return {
        "preset": places,
        "training_seed": seed,
        "seeds": len(SEEDS),
        "sampling": {
            "tokens": NEW_TOKENS,
            "top_p": SAMPLING.top_p,
            "published_top_p": PUBLISHED.top_p,
            "freq_penalty": PUBLISHED.freq_penalty,
        },
        "completions": {name: PER_PROMPT[name] * len(texts) for name, texts in PROMPTS.items()},
        "control_completions": CONTROLS_PER_PROMPT * len(prompts.TABLE_PROMPTS),
        "visitor_completions": VISITORS_PER_PROMPT * len(prompts.TABLE_PROMPTS),
        "corpus": search_corpus(seed),
        **measure_tone(bench),
        **measure_controls(bench),
        "visitors": measure_visitors(bench),
        "greedy": measure_greedy(bench),
        "perplexity": measure_price(bench),
        "additions": measure_additions(model, tokenizer, places["activation_additions"]),
        "topic": measure_topic(model, tokenizer, places["topic"]),
    }


def stored_figures(folder: Path) -> dict[str, Any]:
    """Read what an evaluation stored in a folder.

    Raises:
        ValueError: it is not there, or it is not a whole table of this version.
    """
    card.need(folder, "evaluation.json")
    path = folder / "evaluation.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        report.comparison([found])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} is not a whole table of this version: run embedded_model.evaluate again"
        ) from None
    return found


def compare(folders: Sequence[Path]) -> None:
    """Put the tables of measured models side by side, in the card, and their figures in a file.

    Raises:
        ValueError: fewer than two models, one twice, or one whose figures are not there or are
            those of another table.
    """
    records = [card.records_of(folder) for folder in folders]
    if len({folder.resolve() for folder in records}) < max(2, len(records)):
        raise ValueError("expected at least two folders to compare, each of them once")
    found = [stored_figures(folder) for folder in records]
    text = report.comparison(found)
    print(text)
    (card.HERE / "seeds.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    card.write_between(card.HERE / "README.md", "seeds", text)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure the embedded model and print the table.")
    shipped = "folder of a model (default: the shipped one)"
    parser.add_argument("--model", type=Path, default=FOLDER, help=shipped)
    where = "where the figures go as JSON (default: evaluation.json beside the model card)"
    parser.add_argument("--out", type=Path, help=where)
    beside = "folders of models that were measured: put their tables beside each other"
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FOLDER", help=beside)
    options = parser.parse_args()
    records = card.records_of(options.model)
    out = options.out or records / "evaluation.json"
    try:
        if options.compare:
            compare(options.compare)
            return
        check(options.model, out)
    except ValueError as error:
        parser.error(str(error))
    result = measure(options.model)
    try:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    finally:  # an hour of work is not lost on a full disk
        text = report.markdown(result)
        print(text)
    if options.out is None and card.has_place(records / "README.md", "table"):
        card.write_between(records / "README.md", "table", text)


if __name__ == "__main__":
    main()
