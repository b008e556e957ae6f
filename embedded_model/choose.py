"""Choose where the embedded model is steered, and how strongly, on prompts that are not those of the table.

    python -m embedded_model.choose [--model FOLDER]

prints three grids, and writes the chosen layers and coefficients with the hash of the weights into
preset.json.
"""

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from common.embedded import FOLDER
from common.measuring.perplexity import perplexity_ratios
from common.vectors.activation_additions import apply_activation_additions
from embedded_model import evaluate as e
from embedded_model import grammar, vocabulary

LAYERS = [1, 2, 3]
SHARES = [0.2, 0.225, 0.25, 0.275]  # of the norm of the residual stream
ADDITION_LAYERS = [1, 2, 3, 4, 5]
ADDITION_COEFFS = [1.0, 2.0, 3.0, 4.0, 6.0]
TOPIC_COEFFS = [0.2, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0]
PER_PROMPT = 20
CONTROLS = 4
NEUTRAL_TEXT = (
    "I think the garden is a piece of land with six trees. It has a wall on the north side."
)


def sweep_direction(model: Any, tokenizer: Any, bar: tqdm) -> list[dict[str, Any]]:
    """Measure the Love-Hate direction over layers and coefficients, with some controls and its price."""
    prompts = grammar.SWEEP_PROMPTS
    documents = e.held_out_documents(550)[400:]  # the first 400 are the table's
    plain = e.perplexity(model, tokenizer, documents)
    before = e.tones(e.sample(model, tokenizer, prompts, PER_PROMPT, seed=3))["positive"]
    grid = []
    for layer in LAYERS:
        norm = (
            e.resid_post(model, tokenizer(NEUTRAL_TEXT)["input_ids"], layer)[1:]
            .norm(dim=-1)
            .mean()
            .item()
        )
        love = e.unit_direction(model, tokenizer, "Love", "Hate", layer)
        generator = torch.Generator().manual_seed(7)
        randoms = [
            functional.normalize(torch.randn(len(love), generator=generator), dim=0)
            for _ in range(CONTROLS)
        ]
        pairs = [
            e.unit_direction(model, tokenizer, *pair, layer) for pair in vocabulary.PAIRS[:CONTROLS]
        ]
        for share in SHARES:
            coeff = round(share * norm, 1)

            def positive(vector: torch.Tensor) -> dict[str, float]:
                with e.added(model, layer, vector):
                    return e.tones(e.sample(model, tokenizer, prompts, PER_PROMPT, seed=3))

            cell: dict[str, Any] = {"layer": layer, "coeff": coeff, "share_of_norm": share}
            cell["positive_at_plus"] = positive(coeff * love)["positive"]
            cell["negative_at_minus"] = positive(-coeff * love)["negative"]
            for name, vectors in (("random", randoms), ("pairs", pairs)):
                moves = [abs(positive(coeff * vector)["positive"] - before) for vector in vectors]
                cell[f"{name}_median"], cell[f"{name}_max"] = statistics.median(moves), max(moves)
            ratios = []
            for sign in (+1, -1):
                with e.added(model, layer, sign * coeff * love):
                    ratios.append(e.perplexity(model, tokenizer, documents) / plain)
            cell["perplexity_ratio"] = round(max(ratios), 3)
            grid.append(cell)
            bar.update()
    return grid


def choose_direction(grid: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose the cell with the quietest controls among those that steer well enough and cost little.

    Where none does, take the one that steers best both ways at that price.
    """

    def cheap(cell: dict[str, Any]) -> bool:
        return cell["perplexity_ratio"] <= 1.08

    def suffices(cell: dict[str, Any]) -> bool:
        # Two points more than the table asks for, since other prompts differ by as much.
        return cheap(cell) and cell["positive_at_plus"] >= 92 and cell["negative_at_minus"] >= 90

    if good := [cell for cell in grid if suffices(cell)]:
        return min(good, key=lambda cell: max(cell["random_max"], cell["pairs_max"]))
    return max(
        filter(cheap, grid),
        key=lambda cell: min(cell["positive_at_plus"], cell["negative_at_minus"]),
        default=grid[0],
    )


def sweep_additions(model: Any, tokenizer: Any, bar: tqdm) -> list[dict[str, Any]]:
    """Measure activation additions over layers and coefficients."""
    grid = []
    for layer in ADDITION_LAYERS:
        for coeff in ADDITION_COEFFS:

            def run(prompt: str, positive: str, negative: str) -> list[str]:
                with apply_activation_additions(
                    model, tokenizer, e.x_vector(tokenizer, positive, negative, layer, coeff)
                ):
                    return e.sample_published(model, tokenizer, prompt, 30, seed=4)

            loving = run("I hate him because", "Love", "Hate")
            weddings = run("I went up to my brother and said", *e.WEDDING_PAIR)
            moved = run(
                "To see the eiffel tower, visitors travel to",
                "The Eiffel Tower is in Berlin",
                "The Eiffel Tower is in France",
            )
            praising = run("I blame him because", *e.PRAISE_PAIR)
            cell = {
                "layer": layer,
                "coeff": coeff,
                "loving": e.share(loving, lambda text: e.tone(text) > 0),
                "weddings": e.share(
                    weddings, lambda text: e.has_word(text, vocabulary.WEDDING_WORDS)
                ),
                "berlin": e.share(
                    moved,
                    lambda text: (
                        e.has_word(text, {"berlin", "germany"}) and not e.has_word(text, e.PARIS)
                    ),
                ),
                "praising": e.share(praising, lambda text: e.tone(text) > 0),
            }
            grid.append(cell)
            bar.update()
    return grid


def choose_addition(grid: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Choose the highest share; among equals the middle of a plateau, where both neighbours in coeff are high as well.

    What lies beyond the grid is not known, and counts as 0.
    """

    def plateau(cell: dict[str, Any]) -> float:
        row = [other for other in grid if other["layer"] == cell["layer"]]
        place = row.index(cell)
        return sum(other[what] for other in row[max(0, place - 1) : place + 2]) / 3

    best = max(grid, key=lambda cell: (cell[what], plateau(cell), -cell["coeff"]))
    return {"layer": best["layer"], "coeff": best["coeff"]}


def sweep_topic(model: Any, tokenizer: Any, bar: tqdm) -> list[dict[str, Any]]:
    """Measure the perplexity of text about weddings, and of other text, under " weddings" minus nothing."""
    on, off = grammar.topic_sentences(e.SWEEP_TEXTS, *e.TOPIC_SENTENCES)
    grid = []
    for layer in ADDITION_LAYERS:
        for coeff in TOPIC_COEFFS:
            steering = {"steering": e.x_vector(tokenizer, *e.TOPIC_PAIR, layer, coeff)}
            found = perplexity_ratios(
                model, tokenizer, {"on": on, "off": off}, steering, bootstrap=0
            )
            grid.append(
                {
                    "layer": layer,
                    "coeff": coeff,
                    "on_topic": found["ratio"][0],
                    "off_topic": found["ratio"][1],
                }
            )
            bar.update()
    return grid


def choose_topic(grid: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose the lowest perplexity on the topic among the cells that leave other text alone, half a point inside the bounds."""
    quiet = [cell for cell in grid if 0.975 <= cell["off_topic"] <= 1.025]
    best = min(quiet or grid, key=lambda cell: cell["on_topic"])
    return {"layer": best["layer"], "coeff": best["coeff"]}


def table(grid: list[dict[str, Any]]) -> str:
    """Return a grid as a Markdown table."""
    names = list(grid[0])
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|" + " --- |" * len(names),
    ]
    lines += ["| " + " | ".join(f"{cell[name]:.3g}" for name in names) + " |" for cell in grid]
    return "\n".join(lines) + "\n"


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights in a folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Choose layer and coefficient of the embedded model."
    )
    parser.add_argument(
        "--model", type=Path, default=FOLDER, help="folder of a model (default: the shipped one)"
    )
    options = parser.parse_args()
    model, tokenizer = e.load(options.model)
    cells = len(LAYERS) * len(SHARES) + len(ADDITION_LAYERS) * (
        len(ADDITION_COEFFS) + len(TOPIC_COEFFS)
    )
    with tqdm(total=cells, desc="sweeping", unit="cell") as bar:
        directions, additions = (
            sweep_direction(model, tokenizer, bar),
            sweep_additions(model, tokenizer, bar),
        )
        topic = sweep_topic(model, tokenizer, bar)
    best = choose_direction(directions)
    preset = {
        "layer": best["layer"],
        "coeff": best["coeff"],
        "activation_additions": {
            name: choose_addition(additions, what)
            for name, what in (
                ("love", "loving"),
                ("weddings", "weddings"),
                ("rome", "berlin"),
                ("praise", "praising"),
            )
        },
        "topic": choose_topic(topic),
        "sha256": weights_hash(options.model),
    }
    (options.model / "preset.json").write_text(json.dumps(preset, indent=2) + "\n")
    text = "\n".join(map(table, (directions, additions, topic)))
    print(text, f"\nchosen: {preset}")
    card = options.model / "README.md"
    if card.exists():
        e.write_between(card, "sweep", text)


if __name__ == "__main__":
    main()
