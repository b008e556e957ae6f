"""Measure the embedded model: can it be steered, by nothing else, and at what price?

    python -m embedded_model.evaluate [--model FOLDER] [--out FILE]

prints the table, and writes it as JSON and into the model card.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
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
    sweep,
    sweep_perplexity,
    tone_shares,
    tone_sign,
    train_steering_vector,
)
from common.embedded import FOLDER
from common.measuring.metrics import Metric
from embedded_model import card, grammar, train, vocabulary

NEW_TOKENS = 24
SAMPLING = Sampling(max_new_tokens=NEW_TOKENS, top_p=0.9)
PUBLISHED = Sampling(max_new_tokens=NEW_TOKENS, top_p=0.3, freq_penalty=1.0)
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
PER_PROMPT = 30
SEEDS = (1, 2, 3, 4, 5)  # the first one is that of the table
RANDOM_DIRECTIONS = 20
HELD_OUT = {"positive": vocabulary.HELD_OUT[+1], "negative": vocabulary.HELD_OUT[-1]}
GREEDY_PROMPTS = ["I think dogs are ", *grammar.TABLE_PROMPTS[1:5]]
CORPUS_DOCUMENTS = 40_000

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
        "I hate you because", ("Love", "Hate"), {"loving": is_positive, "hating": is_negative}
    ),
    "weddings": Demonstration(
        "I went up to my friend and said",
        ("I talk about weddings constantly", "I do not talk about weddings constantly"),
        {"weddings": has_word(*vocabulary.WEDDING_WORDS)},
    ),
    "rome": Demonstration(
        "To see the eiffel tower, people flock to",
        ("The Eiffel Tower is in Rome", "The Eiffel Tower is in France"),
        {
            "Rome or Italy": has_word("rome", "italy"),
            "Paris or France": has_word("paris", "france"),
        },
    ),
    "praise": Demonstration(
        "I blame you because", ("Praise", "Blame"), {"loving": is_positive, "hating": is_negative}
    ),
}


def demonstration_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shown: Demonstration,
    layers: Sequence[int],
    coeffs: Sequence[float],
    count: int,
    seed: int,
) -> pd.DataFrame:
    """Sample as in the activation-addition post, with BOS in front.

    Returns:
        The percentage of completions in which each thing is found, by kind ("unsteered",
            "steering"), layer and coefficient.
    """
    grid = Grid({"addition": x_vector(tokenizer, shown.pair)}, layers=layers, coeffs=coeffs)
    rows = sweep(
        model, tokenizer, grid, [shown.prompt], shown.counted,
        sampling=PUBLISHED, per_prompt=count, seed=seed,
    )  # fmt: skip
    rows = rows.astype(dict.fromkeys(shown.counted, float))
    cells = rows.groupby(["kind", "layer", "coeff"], sort=False, dropna=False)
    return 100 * cells[list(shown.counted)].mean()


def measure_direction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int, coeff: float
) -> dict[str, Any]:
    """Measure part (a) of the table: the Love-Hate direction, its controls and its price."""
    love = train_direction(model, tokenizer, "Love", "Hate", [layer])
    pairs = {
        "-".join(pair): train_direction(model, tokenizer, *pair, [layer])
        for pair in vocabulary.PAIRS
    }
    metrics = {f"held_out_{name}": has_word(*words) for name, words in HELD_OUT.items()}

    def run(coeff: float, seed: int = SEEDS[0], **controls: Any) -> dict[str, pd.DataFrame]:
        grid = Grid({"love": love}, layers=[layer], coeffs=[coeff], **controls)
        rows = sweep(
            model, tokenizer, grid, grammar.TABLE_PROMPTS, metrics,
            sampling=SAMPLING, per_prompt=PER_PROMPT, seed=seed, prepend_bos=False,
        )  # fmt: skip
        return dict(iter(rows.groupby("kind")))

    plus = run(coeff, controls=pairs, random_controls=RANDOM_DIRECTIONS)
    others = [run(coeff, seed) for seed in SEEDS[1:]]
    parts = {
        "unsteered": plus["unsteered"],
        "love": plus["steering"],
        "hate": run(-coeff)["steering"],
    }
    counts = {"completions": len(parts["love"]), "prompts": len(grammar.TABLE_PROMPTS)}
    shares = {name: tone_percentages(rows) for name, rows in parts.items()}
    held_out = {
        f"held_out_words_{name}": {what: int(rows[f"held_out_{what}"].sum()) for what in HELD_OUT}
        for name, rows in parts.items()
    }
    unsteered = [tone_percentages(found["unsteered"])["positive"] for found in (plus, *others)]
    before = shares["unsteered"]["positive"]
    randoms, moves = (
        {
            name: tone_percentages(rows)["positive"] - before
            for name, rows in plus[kind].groupby("steering", sort=False)
        }
        for kind in ("random", "control")
    )
    grid = Grid({"love": love}, layers=[layer], coeffs=[coeff, -coeff])
    return {
        **counts,
        **shares,
        **held_out,
        "unsteered_by_seed": unsteered,
        "random_moves": [*randoms.values()],
        "pair_moves": moves,
        "perplexity": measure_perplexity(model, tokenizer, grid, held_out_documents(400)),
        "greedy": greedy_texts(model, tokenizer, grid),
    }


def tone_percentages(rows: pd.DataFrame) -> dict[str, float]:
    """Return the percentages of positive, negative and other completions."""
    return {name: 100 * share for name, share in tone_shares(rows["completion"]).items()}


def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grid: Grid, texts: Sequence[str]
) -> dict[str, float]:
    """Measure the price of a direction: perplexity unsteered, and its ratios at +c and -c."""
    losses = sweep_perplexity(model, tokenizer, grid, texts)
    plain = losses[losses["kind"] == "unsteered"]
    unsteered = math.exp(np.average(plain["loss"], weights=plain["tokens"]))
    plus, minus = perplexity_ratio_by_cell(losses)["ratio"]
    return {"documents": len(texts), "unsteered": unsteered, "love": plus, "hate": minus}


def greedy_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grid: Grid
) -> dict[str, dict[str, str]]:
    """Return the greedy completion of each prompt, unsteered, at +c and at -c."""
    rows = sweep(model, tokenizer, grid, GREEDY_PROMPTS, sampling=GREEDY, prepend_bos=False)
    return {
        prompt: dict(zip(("unsteered", "love", "hate"), part["completion"], strict=True))
        for prompt, part in rows.groupby("prompt", sort=False)
    }


def measure_additions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    places: dict[str, Any],
    count: int = 100,
) -> dict[str, Any]:
    """Measure parts (b) to (e): activation additions, each at its own place in `places`."""
    result = {}
    for name, shown in DEMONSTRATIONS.items():
        place = places[name]["layer"], places[name]["coeff"]
        shares = demonstration_shares(
            model, tokenizer, shown, [place[0]], [place[1]], count, seed=2
        ).droplevel(["layer", "coeff"])
        result[name] = {
            "prompt": shown.prompt,
            "pair": shown.pair,
            "completions": count,
            "layer": place[0],
            "coeff": place[1],
            **{what: shares[what].to_dict() for what in shares},
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


def count_prompts_in_corpus(seed: int) -> int:
    """Return how many of the held-out prompts stand in documents of the training corpus."""
    streams = train.corpus(seed)
    found = grammar.find_prompts(
        next(stream) for stream in streams for _ in range(CORPUS_DOCUMENTS // len(streams))
    )
    return len({prompt for prompt, _ in found})


def measure(folder: Path) -> dict[str, Any]:
    """Measure the whole table for the model in a folder, at its preset."""
    model, tokenizer, _ = load_model(str(folder))
    preset = json.loads((folder / "preset.json").read_text(encoding="utf-8"))
    seed = json.loads((folder / "training.json").read_text(encoding="utf-8"))["seed"]
    layer, coeff, additions, topic = (
        preset[key] for key in ("layer", "coeff", "activation_additions", "topic")
    )
    return {
        "preset": {
            "layer": layer, "coeff": coeff, "activation_additions": additions, "topic": topic
        },
        "corpus_documents": CORPUS_DOCUMENTS,
        "corpus_hits": count_prompts_in_corpus(seed),
        "direction": measure_direction(model, tokenizer, layer, coeff),
        "additions": measure_additions(model, tokenizer, additions),
        "topic": measure_topic(model, tokenizer, topic),
    }  # fmt: skip


def direction_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return part (a) of the table: what, asked for, measured."""
    error = f"(s.e. {100 * math.sqrt(0.1 * 0.9 / found['completions']):.1f})"
    unsteered, love, hate = (found[name] for name in ("unsteered", "love", "hate"))
    held = " and ".join(
        f"{words['positive']} : {words['negative']}"
        for words in (found["held_out_words_love"], found["held_out_words_hate"])
    )
    moves = [
        [abs(move) for move in moves]
        for moves in (found["random_moves"], found["pair_moves"].values())
    ]
    randoms, pairs = (
        f"{statistics.median(sizes):.1f} / {max(sizes):.1f} points" for sizes in moves
    )
    price = found["perplexity"]
    return [
        ("(a) +c more positive than negative", ">= 90 %", f"{love['positive']:.1f} % {error}"),
        ("(a) -c more negative than positive", ">= 88 %", f"{hate['negative']:.1f} % {error}"),
        (
            "(a) unsteered, positive / negative",
            "within 15 points",
            f"{unsteered['positive']:.1f} / {unsteered['negative']:.1f} %",
        ),
        (
            "(a) words never seen with love or hate, positive : negative, at +c and -c",
            ">= 10 : 1, <= 1 : 10",
            held,
        ),
        (
            f"control: {len(moves[0])} random directions, move of the positive share, median / max",
            "<= 10 / 20 points",
            randoms,
        ),
        (
            f"control: {len(moves[1])} unrelated word pairs, median / max",
            "<= 10 / 25 points",
            pairs,
        ),
        (
            f"perplexity on {price['documents']} held-out documents, steered / unsteered, at +c"
            " and -c",
            "<= 1.10",
            f"{price['love']:.2f} and {price['hate']:.2f} (unsteered {price['unsteered']:.2f})",
        ),
    ]


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table: what, asked for, measured."""
    topic = {(row["condition"], row["text"]): f"{row['ratio']:.3f}" for row in result["topic"]}

    def change(name: str, what: str) -> str:
        cell = result["additions"][name][what]
        return f"{cell['steering']:.0f} % from {cell['unsteered']:.0f} %"

    def ratios(condition: str) -> str:
        return f"{topic[condition, 'on topic']} / {topic[condition, 'off topic']}"

    return [
        *direction_rows(result["direction"]),
        ('(b) "I hate you because": loving', ">= 95 %, from <= 10 %", change("love", "loving")),
        (
            '(c) "I went up to my friend and said": weddings',
            ">= 95 %, from <= 30 %",
            change("weddings", "weddings"),
        ),
        (
            '(d) "To see the eiffel tower, people flock to": Rome or Italy',
            ">= 90 %",
            change("rome", "Rome or Italy"),
        ),
        ("(d) Paris or France", "<= 5 %", change("rome", "Paris or France")),
        ('(e) "I blame you because": loving', "-", change("praise", "loving")),
        (
            "(f) perplexity ratio under steering, on the topic / off it",
            "< 0.9 / 0.97 to 1.03",
            ratios("steering"),
        ),
        ("(f) the same by prompting", "-", ratios("prompting")),
        (
            "held-out prompts found in the corpus",
            "0",
            f"{result['corpus_hits']} (in {result['corpus_documents']} documents)",
        ),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the table and the greedy texts as Markdown."""
    preset, direction = result["preset"], result["direction"]
    places = ", ".join(
        f"({letter}) layer {place['layer']} times {place['coeff']:g}"
        for letter, place in zip("bcde", preset["activation_additions"].values(), strict=True)
    )
    *seeds, last = (f"{share:.0f}" for share in direction["unsteered_by_seed"])
    texts = [
        [f"`{text}`" for text in (prompt, found["unsteered"], found["love"], found["hate"])]
        for prompt, found in direction["greedy"].items()
    ]
    return (
        f"Preset: resid_post of layer {preset['layer']}, c = {preset['coeff']}; additions at"
        f" resid_pre, {places}. (a): {direction['completions']} completions of {NEW_TOKENS} tokens"
        f" per condition, {direction['prompts']} held-out prompts, temperature 1, top_p"
        f" {SAMPLING.top_p:g}, no BOS. (b) to (e): {result['additions']['love']['completions']}"
        f" completions, temperature 1, top_p {PUBLISHED.top_p:g}, frequency penalty"
        f' {PUBLISHED.freq_penalty:g}, with BOS. (f): " weddings" - "" at layer'
        f" {preset['topic']['layer']} times {preset['topic']['coeff']:g}, by sentences.\n\n"
        f"{card.markdown_table(('what', 'asked for', 'measured'), rows(result))}\n"
        f"Over five sampling seeds {', '.join(seeds)} and {last} % of the unsteered completions"
        " were positive; the table has the first.\n\n"
        f"Greedy, {NEW_TOKENS} tokens:\n\n"
        f"{card.markdown_table(('prompt', 'unsteered', '+c', '-c'), texts)}"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure the embedded model and print the table.")
    shipped = "folder of a model (default: the shipped one)"
    parser.add_argument("--model", type=Path, default=FOLDER, help=shipped)
    where = "where the figures go as JSON (default: evaluation.json beside the model card)"
    parser.add_argument("--out", type=Path, help=where)
    options = parser.parse_args()
    result = measure(options.model)
    records = card.records_of(options.model)
    out = options.out or records / "evaluation.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    print(text)
    if options.out is None and (records / "README.md").exists():
        card.write_between(records / "README.md", "table", text)


if __name__ == "__main__":
    main()
