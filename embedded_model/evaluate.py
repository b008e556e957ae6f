"""Measure the embedded model: can it be steered, by nothing else, and at what price?

    python -m embedded_model.evaluate [--model FOLDER] [--out FILE]

prints the table, and writes it as JSON and into the model card beside the weights.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.embedded import FOLDER
from common.measuring.perplexity import perplexity_ratios
from common.measuring.tone import tone
from common.passes.padding import encode
from common.texts import sampling
from common.texts.generation import completions
from common.vectors.activation_additions import (
    ActivationAddition,
    apply_activation_additions,
    get_x_vector,
)
from common.vectors.reading import record_activations
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector
from embedded_model import grammar, train, vocabulary

NEW_TOKENS = 24
PER_PROMPT = 30
RANDOM_DIRECTIONS = 20


def load(folder: Path) -> tuple[Any, Any]:
    """Load model (fp32, evaluation mode) and tokenizer from a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return model, tokenizer


def added(model: Any, layer: int, vector: Tensor) -> AbstractContextManager[None]:
    """Add `vector` [d_model] to resid_post of `layer` at all positions while the block is open."""
    return SteeringVector({layer: vector}).apply(model)


@torch.no_grad()
def resid_post(model: Any, ids: list[int], layer: int) -> Tensor:
    """Return the output of block `layer` for one text, [pos, d_model]."""
    with record_activations(model, layer_nums=[layer]) as records:
        model(torch.tensor([ids]))
    return records[layer][0][0]


def unit_direction(model: Any, tokenizer: Any, positive: str, negative: str, layer: int) -> Tensor:
    """Return the unit difference of two prompts at their last tokens, without BOS, [d_model]."""
    vector = train_steering_vector(model, tokenizer, [(positive, negative)], layers=[layer])
    return vector.unit().layer_activations[layer]


def x_vector(
    tokenizer: Any, positive: str, negative: str, layer: int, coeff: float, bos: bool = True
) -> list[ActivationAddition]:
    """Return the additions of an X-vector at resid_pre of `layer`, the shorter prompt padded with spaces on its right."""
    space = tokenizer(" ")["input_ids"][0]
    pair = get_x_vector(
        positive,
        negative,
        coeff,
        layer,
        tokenizer=tokenizer,
        pad_method="tokens_right",
        custom_pad_id=space,
    )
    return [
        ActivationAddition(addition.coeff, layer, tokens=addition.tokens[0 if bos else 1 :])
        for addition in pair
    ]


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: list[str], count: int, seed: int, top_p: float = 0.9
) -> list[str]:
    """Sample `count` completions of each prompt, without BOS, at temperature 1."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompts * count, return_tensors="pt", padding=True)
    ids = model.generate(
        **inputs,
        do_sample=True,
        top_p=top_p,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def sample_published(
    model: Any, tokenizer: Any, prompt: str, count: int, seed: int, bos: bool = True
) -> list[str]:
    """Sample as in the activation-addition post: temperature 1, top_p 0.3, frequency penalty 1, BOS in front."""
    inputs = encode(tokenizer, [prompt] * count, bos)
    ids = sampling.sample(
        model,
        inputs,
        [(seed, row) for row in range(count)],
        sampling.Sampling(max_new_tokens=NEW_TOKENS, top_p=0.3, freq_penalty=1.0),
    )
    return completions(tokenizer, inputs, ids)


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """Return the greedy completion of a prompt, without BOS."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        **inputs, do_sample=False, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share(texts: list[str], test: Callable[[str], bool]) -> float:
    """Return the percentage of texts that pass a test."""
    return 100 * sum(map(test, texts)) / len(texts)


def tones(texts: list[str]) -> dict[str, float]:
    """Return the percentages of texts that are more positive than negative, and the reverse."""
    return {
        "positive": share(texts, lambda t: tone(t) > 0),
        "negative": share(texts, lambda t: tone(t) < 0),
    }


def has_word(text: str, words: set[str]) -> bool:
    """Return whether one of the words stands in a text, whatever its case."""
    return bool(words & set(re.findall(r"[a-z]+", text.lower())))


def held_out_documents(count: int) -> list[str]:
    """Write documents that no training has seen: their seed is used nowhere else."""
    source = grammar.documents(987_654_321)
    return [next(source) for _ in range(count)]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return the perplexity per token of documents with BOS in front and EOS behind."""
    end = tokenizer.eos_token_id
    total, count = 0.0, 0
    ordered = sorted(([end, *tokenizer(text)["input_ids"], end] for text in texts), key=len)
    for start in range(0, len(ordered), 50):
        rows = ordered[start : start + 50]
        ids = torch.full((len(rows), max(map(len, rows))), end)
        targets = torch.full_like(
            ids, -100
        )  # padding counts for nothing; it stands on the right, where it disturbs nobody
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            targets[index, : len(row)] = torch.tensor(row)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        total += functional.cross_entropy(
            logits, targets[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((targets[:, 1:] != -100).sum())
    return math.exp(total / count)


WEDDING_PAIR = ("I talk about weddings constantly", "I do not talk about weddings constantly")
ROME, PARIS = {"rome", "italy"}, {"paris", "france"}
PRAISE_PAIR, TOPIC_PAIR = ("Praise", "Blame"), (" weddings", "")
TOPIC_SENTENCES = (800, 1600)  # about weddings, and others
TABLE_TEXTS, SWEEP_TEXTS = (
    555_000_001,
    555_000_002,
)  # seeds of the documents for the table of perplexities


def corpus_hits(count: int, seed: int) -> int:
    """Return how many of the held-out prompts stand in `count` documents of the training corpus."""
    streams = train.corpus(seed)
    found = grammar.find_prompts(
        next(stream) for stream in streams for _ in range(count // len(streams))
    )
    return len({prompt for prompt, _ in found})


def measure_direction(
    model: Any, tokenizer: Any, layer: int, coeff: float, bar: tqdm
) -> dict[str, Any]:
    """Measure part (a) of the table: the Love-Hate direction, its controls and its price."""
    prompts = grammar.TABLE_PROMPTS

    def run(vector: Tensor | None) -> list[str]:
        bar.update()
        if vector is None:
            return sample(model, tokenizer, prompts, PER_PROMPT, seed=1)
        with added(model, layer, vector):
            return sample(model, tokenizer, prompts, PER_PROMPT, seed=1)

    love = coeff * unit_direction(model, tokenizer, "Love", "Hate", layer)
    texts = {"unsteered": run(None), "love": run(love), "hate": run(-love)}
    result: dict[str, Any] = {"completions": len(texts["love"]), "prompts": len(prompts)}
    result |= {name: tones(found) for name, found in texts.items()}
    for name in ("unsteered", "love", "hate"):
        counts = [
            sum(has_word(text, set(vocabulary.HELD_OUT[t])) for text in texts[name])
            for t in (+1, -1)
        ]
        result[f"held_out_words_{name}"] = {"positive": counts[0], "negative": counts[1]}
    before = result["unsteered"]["positive"]
    generator = torch.Generator().manual_seed(20)
    moves = []
    for _ in range(RANDOM_DIRECTIONS):
        random_direction = functional.normalize(torch.randn(len(love), generator=generator), dim=0)
        moves.append(tones(run(coeff * random_direction))["positive"] - before)
    result["random_moves"] = moves
    result["pair_moves"] = {}
    result["pair_cosines"] = {}
    for positive, negative in vocabulary.PAIRS:
        vector = unit_direction(model, tokenizer, positive, negative, layer)
        result["pair_moves"][f"{positive}-{negative}"] = (
            tones(run(coeff * vector))["positive"] - before
        )
        result["pair_cosines"][f"{positive}-{negative}"] = float(vector @ love) / coeff
    documents = held_out_documents(400)
    plain = perplexity(model, tokenizer, documents)
    result["perplexity"] = {"unsteered": plain, "documents": len(documents)}
    for name, vector in (("love", love), ("hate", -love)):
        with added(model, layer, vector):
            result["perplexity"][name] = perplexity(model, tokenizer, documents)
        bar.update()
    result["greedy"] = {}
    for prompt in ("I think dogs are ", *prompts[1:5]):
        found = {"unsteered": greedy(model, tokenizer, prompt)}
        for name, vector in (("love", love), ("hate", -love)):
            with added(model, layer, vector):
                found[name] = greedy(model, tokenizer, prompt)
        result["greedy"][prompt] = found
    return result


def measure_additions(
    model: Any, tokenizer: Any, places: dict[str, Any], bar: tqdm, count: int = 100
) -> dict[str, Any]:
    """Measure parts (b) to (d): activation additions to the first positions, with the published sampler.

    Each has a layer and a coefficient of its own in `places`, as the three demonstrations of the
    post have.
    """

    def measure(
        name: str, prompt: str, pair: tuple[str, str], tests: dict[str, Callable[[str], bool]]
    ) -> dict[str, Any]:
        layer, coeff = places[name]["layer"], places[name]["coeff"]
        result: dict[str, Any] = {
            "prompt": prompt,
            "pair": pair,
            "completions": count,
            "layer": layer,
            "coeff": coeff,
        }
        for bos in (True, False):
            before = sample_published(model, tokenizer, prompt, count, seed=2, bos=bos)
            with apply_activation_additions(
                model, tokenizer, x_vector(tokenizer, *pair, layer, coeff, bos)
            ):
                after = sample_published(model, tokenizer, prompt, count, seed=2, bos=bos)
            key = "with_bos" if bos else "without_bos"
            result[key] = {
                name: {"unsteered": share(before, test), "steered": share(after, test)}
                for name, test in tests.items()
            }
            result[key]["example"] = {"unsteered": before[0], "steered": after[0]}
            bar.update()
        return result

    return {
        "love": measure(
            "love",
            "I hate you because",
            ("Love", "Hate"),
            {"loving": lambda t: tone(t) > 0, "hating": lambda t: tone(t) < 0},
        ),
        "weddings": measure(
            "weddings",
            "I went up to my friend and said",
            WEDDING_PAIR,
            {"weddings": lambda t: has_word(t, vocabulary.WEDDING_WORDS)},
        ),
        "rome": measure(
            "rome",
            "To see the eiffel tower, people flock to",
            ("The Eiffel Tower is in Rome", "The Eiffel Tower is in France"),
            {
                "Rome or Italy": lambda t: has_word(t, ROME),
                "Paris or France": lambda t: has_word(t, PARIS),
            },
        ),
        "praise": measure(
            "praise",
            "I blame you because",
            PRAISE_PAIR,
            {"loving": lambda t: tone(t) > 0, "hating": lambda t: tone(t) < 0},
        ),
    }


def measure_topic(
    model: Any, tokenizer: Any, place: dict[str, Any], bar: tqdm
) -> list[dict[str, Any]]:
    """Measure the table of perplexities of the post: " weddings" minus nothing, on text about weddings and on other text."""
    on, off = grammar.topic_sentences(TABLE_TEXTS, *TOPIC_SENTENCES)
    conditions = {
        "steering": x_vector(tokenizer, *TOPIC_PAIR, place["layer"], place["coeff"]),
        "prompting": TOPIC_PAIR[0],
    }
    found = perplexity_ratios(model, tokenizer, {"on topic": on, "off topic": off}, conditions)
    bar.update()
    return found.round(4).to_dict("records")


def measure(folder: Path, preset: dict[str, Any]) -> dict[str, Any]:
    """Measure the whole table for the model in a folder, at a preset."""
    model, tokenizer = load(folder)
    steps = 3 + RANDOM_DIRECTIONS + len(vocabulary.PAIRS) + 2 + 8 + 1
    seed = json.loads((folder / "training.json").read_text())["seed"]
    with tqdm(total=steps, desc="evaluating", unit="measure") as bar:
        return {
            "preset": preset,
            "corpus_documents": 40_000,
            "corpus_hits": corpus_hits(40_000, seed),
            "direction": measure_direction(model, tokenizer, preset["layer"], preset["coeff"], bar),
            "additions": measure_additions(model, tokenizer, preset["activation_additions"], bar),
            "topic": measure_topic(model, tokenizer, preset["topic"], bar),
        }


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table: what, asked for, measured."""
    d, a = result["direction"], result["additions"]
    error = 100 * math.sqrt(0.1 * 0.9 / d["completions"])
    random_moves = sorted(abs(move) for move in d["random_moves"])
    pair_moves = sorted(abs(move) for move in d["pair_moves"].values())
    held = {name: d[f"held_out_words_{name}"] for name in ("love", "hate")}
    love, weddings, rome, praise = (
        a[name]["with_bos"] for name in ("love", "weddings", "rome", "praise")
    )
    topic = {(row["condition"], row["text"]): f"{row['ratio']:.3f}" for row in result["topic"]}
    ppl = d["perplexity"]

    def change(cell: dict[str, float]) -> str:
        return f"{cell['steered']:.0f} % from {cell['unsteered']:.0f} %"

    return [
        (
            "(a) +c more positive than negative",
            ">= 90 %",
            f"{d['love']['positive']:.1f} % (s.e. {error:.1f})",
        ),
        (
            "(a) -c more negative than positive",
            ">= 88 %",
            f"{d['hate']['negative']:.1f} % (s.e. {error:.1f})",
        ),
        (
            "(a) unsteered, positive / negative",
            "within 15 points",
            f"{d['unsteered']['positive']:.1f} / {d['unsteered']['negative']:.1f} %",
        ),
        (
            "(a) words never seen with love or hate, positive : negative, at +c and -c",
            ">= 10 : 1, <= 1 : 10",
            " and ".join(
                f"{held[name]['positive']} : {held[name]['negative']}" for name in ("love", "hate")
            ),
        ),
        (
            (
                f"control: {len(random_moves)} random directions, move of the positive share,"
                " median / max"
            ),
            "<= 10 / 20 points",
            f"{statistics.median(random_moves):.1f} / {random_moves[-1]:.1f} points",
        ),
        (
            f"control: {len(pair_moves)} unrelated word pairs, median / max",
            "<= 10 / 25 points",
            f"{statistics.median(pair_moves):.1f} / {pair_moves[-1]:.1f} points",
        ),
        (
            (
                f"perplexity on {ppl['documents']} held-out documents, steered / unsteered, at +c"
                " and -c"
            ),
            "<= 1.10",
            (
                f"{ppl['love'] / ppl['unsteered']:.2f} and {ppl['hate'] / ppl['unsteered']:.2f}"
                f" (unsteered {ppl['unsteered']:.2f})"
            ),
        ),
        ('(b) "I hate you because": loving', ">= 95 %, from <= 10 %", change(love["loving"])),
        (
            '(c) "I went up to my friend and said": weddings',
            ">= 95 %, from <= 30 %",
            change(weddings["weddings"]),
        ),
        (
            '(d) "To see the eiffel tower, people flock to": Rome or Italy',
            ">= 90 %",
            change(rome["Rome or Italy"]),
        ),
        ("(d) Paris or France", "<= 5 %", change(rome["Paris or France"])),
        ('(e) "I blame you because": loving', "-", change(praise["loving"])),
        (
            "(f) perplexity ratio under steering, on the topic / off it",
            "< 0.9 / 0.97 to 1.03",
            f"{topic['steering', 'on topic']} / {topic['steering', 'off topic']}",
        ),
        (
            "(f) the same by prompting",
            "-",
            f"{topic['prompting', 'on topic']} / {topic['prompting', 'off topic']}",
        ),
        (
            "held-out prompts found in the corpus",
            "0",
            f"{result['corpus_hits']} (in {result['corpus_documents']} documents)",
        ),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the table and the greedy texts as Markdown."""
    preset = result["preset"]
    d = result["direction"]
    places = ", ".join(
        f"({letter}) layer {place['layer']} times {place['coeff']:g}"
        for letter, place in zip("bcde", preset["activation_additions"].values(), strict=True)
    )
    lines = [
        f"Preset: resid_post of layer {preset['layer']}, c = {preset['coeff']}; additions at"
        f" resid_pre, {places}. (a): "
        f"{d['completions']} completions of {NEW_TOKENS} tokens per condition, {d['prompts']}"
        " held-out prompts, temperature 1, top_p 0.9, no BOS. "
        f"(b) to (e): {result['additions']['love']['completions']} completions, temperature 1,"
        " top_p 0.3, frequency penalty 1, with BOS. "
        f'(f): " weddings" - "" at layer {preset["topic"]["layer"]} times'
        f" {preset['topic']['coeff']:g}, by sentences.",
        "",
        "| what | asked for | measured |",
        "| --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in rows(result)),
        "",
        "Greedy, 24 tokens:",
        "",
        "| prompt | unsteered | +c | -c |",
        "| --- | --- | --- | --- |",
    ]
    for prompt, texts in d["greedy"].items():
        lines.append(
            "| "
            + " | ".join(
                f"`{text}`" for text in (prompt, texts["unsteered"], texts["love"], texts["hate"])
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file.

    Raises:
        ValueError: The file has no such markers.
    """
    old = path.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(
            f"expected the markers <!-- {name} --> and <!-- /{name} --> in {path}, found none"
        )
    path.write_text(pattern.sub(lambda match: match.group(1) + text + match.group(2), old))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure the embedded model and print the table.")
    parser.add_argument(
        "--model", type=Path, default=FOLDER, help="folder of a model (default: the shipped one)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the figures go as JSON (default: evaluation.json beside the weights)",
    )
    options = parser.parse_args()
    preset = json.loads((options.model / "preset.json").read_text())
    result = measure(
        options.model,
        {key: preset[key] for key in ("layer", "coeff", "activation_additions", "topic")},
    )
    out = options.out or options.model / "evaluation.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    print(text)
    card = options.model / "README.md"
    if options.out is None and card.exists():
        write_between(card, "table", text)


if __name__ == "__main__":
    main()
