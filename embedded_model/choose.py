"""Choose where the embedded model is steered, and how strongly, on prompts not in the table.

    python -m embedded_model.choose [--model FOLDER] [--keep]

prints three grids, and writes the chosen layers and coefficients with the hash of the weights into
preset.json. With --keep the preset stays as it is.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import (
    Grid,
    SteeringVector,
    load_model,
    perplexity_ratio_by_cell,
    record_activations,
    sweep,
    sweep_perplexity,
    tone_sign,
    working_window,
)
from common.embedded import FOLDER
from embedded_model import card, evaluate, grammar, vocabulary
from embedded_model.evaluate import DEMONSTRATIONS, Demonstration, has_word, is_positive

LAYERS = [1, 2, 3]
SHARES = [0.2, 0.225, 0.25, 0.275]  # of the norm of the residual stream
ADDITION_LAYERS = [1, 2, 3, 4, 5]
ADDITION_COEFFS = [1.0, 2.0, 3.0, 4.0, 6.0]
TOPIC_COEFFS = [0.2, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0]
PER_PROMPT = 20
CONTROLS = 4
MAX_RATIO = 1.08  # a little less than the table allows, since other texts differ
NEUTRAL_TEXT = (
    "I think the garden is a piece of land with six trees. It has a wall on the north side."
)
TEXTS = 555_000_002  # seed of the documents for the sweep of perplexities

_berlin, _paris = has_word("berlin", "germany"), has_word("paris", "france")
CHOSEN_ON = {
    "love": Demonstration("I hate him because", ("Love", "Hate"), {"loving": is_positive}),
    "weddings": DEMONSTRATIONS["weddings"]._replace(prompt="I went up to my brother and said"),
    "rome": Demonstration(
        "To see the eiffel tower, visitors travel to",
        ("The Eiffel Tower is in Berlin", "The Eiffel Tower is in France"),
        {"berlin": lambda texts: [b and not p for b, p in zip(_berlin(texts), _paris(texts))]},
    ),
    "praise": Demonstration("I blame him because", ("Praise", "Blame"), {"praising": is_positive}),
}


@torch.no_grad()
def residual_norms(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: list[int]
) -> dict[int, float]:
    """Return the mean norm of resid_post on a neutral text, without its first token, by layer."""
    inputs = tokenizer(NEUTRAL_TEXT, return_tensors="pt").to(model.device)
    with record_activations(model, layer_nums=layers) as records:
        model(**inputs)
    return {layer: records[layer][0][0, 1:].norm(dim=-1).mean().item() for layer in layers}


def sweep_direction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Sweep the Love-Hate direction, and choose by its working window.

    Returns:
        The chosen layer and coefficient, and the cells of the window.

    Raises:
        ValueError: no cell works.
    """
    norms = residual_norms(model, tokenizer, LAYERS)

    def scaled(positive: str, negative: str) -> SteeringVector:
        direction = evaluate.train_direction(model, tokenizer, positive, negative, LAYERS)
        vectors = direction.layer_activations
        return SteeringVector({layer: norms[layer] * vectors[layer] for layer in LAYERS})

    love, coeffs = {"love": scaled("Love", "Hate")}, [*SHARES, *(-share for share in SHARES)]
    pairs = {"-".join(pair): scaled(*pair) for pair in vocabulary.PAIRS[:CONTROLS]}
    grid = Grid(love, layers=LAYERS, coeffs=coeffs, controls=pairs, random_controls=CONTROLS)
    rows = sweep(
        model, tokenizer, grid, grammar.SWEEP_PROMPTS, {"tone": tone_sign},
        sampling=evaluate.SAMPLING, per_prompt=PER_PROMPT, seed=3, prepend_bos=False,
    )  # fmt: skip
    documents = evaluate.held_out_documents(550)[400:]  # the first 400 are the table's
    costs = sweep_perplexity(model, tokenizer, Grid(love, layers=LAYERS, coeffs=coeffs), documents)
    window = working_window(rows, costs, "tone", max_ratio=MAX_RATIO)
    print(window.reason)
    if window.layer is None or window.coeff is None:
        raise ValueError(window.reason)
    cells = window.cells.rename(columns={"coeff": "share of norm", "ratio": "perplexity ratio"})
    cells.insert(1, "coeff", cells["share of norm"] * cells["layer"].map(norms))
    chosen = {"layer": window.layer, "coeff": round(window.coeff * norms[window.layer], 1)}
    return chosen, cells


def sweep_additions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Sweep the four activation additions.

    Returns:
        The chosen place of each, and all shares by layer and coefficient.
    """
    columns, chosen = [], {}
    for name, shown in CHOSEN_ON.items():
        shares = evaluate.demonstration_shares(
            model, tokenizer, shown, ADDITION_LAYERS, ADDITION_COEFFS, 30, seed=4
        ).xs("steering")
        chosen[name] = choose_addition(shares.reset_index(), *shown.counted)
        columns.append(shares)
    return chosen, pd.concat(columns, axis=1).reset_index()


def choose_addition(cells: pd.DataFrame, what: str) -> dict[str, Any]:
    """Choose the highest share, and among equals the middle of a plateau.

    There the neighbours in coeff are high as well; what lies beyond the grid is not known, and
    counts as 0.

    Args:
        cells: `layer`, `coeff` and the shares, sorted by layer and coeff.
        what: which share.
    """
    plateau = cells.groupby("layer")[what].transform(
        lambda shares: shares.rolling(3, center=True, min_periods=1).sum()
    )
    best = cells.assign(plateau=plateau.round(6)).sort_values(
        [what, "plateau", "coeff"], ascending=[False, False, True], kind="stable"
    )
    return {"layer": int(best["layer"].iloc[0]), "coeff": float(best["coeff"].iloc[0])}


def sweep_topic(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Sweep " weddings" minus nothing on text about weddings and on other text.

    Returns:
        The chosen place, and the perplexity ratios by layer and coefficient.
    """
    additions = evaluate.x_vector(tokenizer, evaluate.TOPIC_PAIR)
    grid = Grid({"weddings": additions}, layers=ADDITION_LAYERS, coeffs=TOPIC_COEFFS)
    mask_len = len(additions[0].token_ids(tokenizer))

    def ratios(texts: list[str]) -> pd.DataFrame:
        # Of shorter texts no token counts.
        long = [text for text in texts if len(tokenizer(text)["input_ids"]) > mask_len]
        losses = sweep_perplexity(model, tokenizer, grid, long, mask_len=mask_len)
        return perplexity_ratio_by_cell(losses)

    on, off = map(ratios, grammar.topic_sentences(TEXTS, *evaluate.TOPIC_SENTENCES))
    cells = on[["layer", "coeff"]].assign(on_topic=on["ratio"], off_topic=off["ratio"])
    return choose_topic(cells), cells


def choose_topic(cells: pd.DataFrame) -> dict[str, Any]:
    """Choose the lowest perplexity on the topic among the cells that leave other text alone.

    They do where its perplexity moves by at most 2.5 %, half a point inside the bounds.
    """
    quiet = cells[cells["off_topic"].between(0.975, 1.025)]
    cells = quiet if len(quiet) else cells
    best = cells.loc[cells["on_topic"].idxmin()]
    return {"layer": int(best["layer"]), "coeff": float(best["coeff"])}


def table(cells: pd.DataFrame) -> str:
    """Return a grid as a Markdown table."""
    header = [name.replace("_", " ") for name in cells]
    return card.markdown_table(
        header, [[f"{value:.3g}" for value in row] for row in cells.to_numpy(float)]
    )


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights in a folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Choose where the embedded model is steered.")
    shipped = "folder of a model (default: the shipped one)"
    parser.add_argument("--model", type=Path, default=FOLDER, help=shipped)
    parser.add_argument("--keep", action="store_true", help="leave preset.json as it is")
    options = parser.parse_args()
    model, tokenizer, _ = load_model(str(options.model))
    direction, directions = sweep_direction(model, tokenizer)
    additions, shares = sweep_additions(model, tokenizer)
    topic, ratios = sweep_topic(model, tokenizer)
    preset = {**direction, "activation_additions": additions, "topic": topic}
    preset["sha256"] = weights_hash(options.model)
    text = "\n".join(map(table, (directions, shares, ratios)))
    print(text, f"\nchosen: {json.dumps(preset)}")
    if not options.keep:
        (options.model / "preset.json").write_text(json.dumps(preset, indent=2) + "\n")
    path = card.records_of(options.model) / "README.md"
    if path.exists():
        card.write_between(path, "sweep", text)


if __name__ == "__main__":
    main()
