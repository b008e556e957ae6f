"""Choose where the embedded model is steered, and how strongly, on prompts not in the table.

    python -m embedded_model.choose [--model FOLDER] [--keep]

prints three grids, and writes the chosen layers and coefficients with the hash of the weights into
preset.json. With --keep the preset stays as it is.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
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
)
from common.embedded import FOLDER
from embedded_model import card, evaluate, grammar, prompts

LAYERS = [1, 2, 3, 4]
SHARES = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]  # of the norm of the residual stream
REACHED = {"positive": 97, "negative": 96}  # a point more than the table asks for, in percent
ADDITION_LAYERS = [1, 2, 3, 4, 5]
# Equal ratios, about: a plateau then says by what factor one may be wrong.
ADDITION_COEFFS = [0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0]
TOPIC_COEFFS = [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
TOPIC_SENTENCES = (600, 1200)  # about weddings, and others
MAX_RATIO, MAX_BREAKS = 1.3, 4  # of perplexities; percent of the texts
PLATEAU = 5  # points below the highest share of an addition
PER_PROMPT = 30
ADDITION_PER_PROMPT = 10
DOCUMENTS = 80  # for the perplexities of the direction
NEUTRAL_TEXT = (
    "I think the garden is a piece of land with six trees. It has a wall on the north side."
)
TEXTS = 555_000_002  # seed of the sentences for the grid of the topic


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
    """Sweep the Love-Hate direction, and choose by `choose_direction`.

    Returns:
        The chosen layer and coefficient, and what was found at each cell: `layer`, `share` (the
            coefficient as a share of the norm of the residual stream), `coeff`, `positive` (at +c)
            and `negative` (at -c) in percent, `breaks` (the percentage of texts that break visibly,
            the larger of the two signs), and `ratio` (of perplexities, the larger of the two).
    """
    norms = residual_norms(model, tokenizer, LAYERS)
    unit = evaluate.train_direction(model, tokenizer, "Love", "Hate", LAYERS).layer_activations
    love = SteeringVector({layer: norms[layer] * unit[layer] for layer in LAYERS})
    grid = Grid({"love": love}, LAYERS, [*SHARES, *(-share for share in SHARES)])
    rows = sweep(
        model, tokenizer, grid, prompts.SWEEP_PROMPTS, {"tone": tone_sign},
        sampling=evaluate.SAMPLING, per_prompt=PER_PROMPT, seed=3, prepend_bos=False,
    )  # fmt: skip
    # The first 400 documents are the table's.
    documents = evaluate.held_out_documents(400 + DOCUMENTS)[400:]
    costs = perplexity_ratio_by_cell(sweep_perplexity(model, tokenizer, grid, documents))
    ratios = costs.set_index(["layer", "coeff"])["ratio"]
    cells = []
    steered = dict(iter(rows[rows["kind"] == "steering"].groupby(["layer", "coeff"])))
    for layer, share in product(LAYERS, SHARES):
        plus, minus = steered[layer, share], steered[layer, -share]
        cells.append(
            {
                "layer": layer,
                "share": share,
                "coeff": share * norms[layer],
                "positive": evaluate.share(plus, +1),
                "negative": evaluate.share(minus, -1),
                "breaks": max(evaluate.break_share(part) for part in (plus, minus)),
                "ratio": max(ratios[layer, share], ratios[layer, -share]),
            }
        )
    table = pd.DataFrame(cells)
    return choose_direction(table), table


def choose_direction(cells: pd.DataFrame) -> dict[str, Any]:
    """Choose the smallest share of the norm at which both tones are reached, by 97 and 96 %.

    Breaks, perplexity and the effect of other directions all grow with the coefficient. So that
    luck does not choose, the next larger share at the same layer has to reach them as well. Among
    equal shares the lowest perplexity ratio decides. Where no cell does all that, the one that
    comes closest is chosen: its worse tone lacks least. Where the text is broken a cell does not
    count: more than 4 % of the texts break visibly, or the perplexity ratio is above 1.3.

    Args:
        cells: what `sweep_direction` found, shares in ascending order.

    Raises:
        ValueError: the text is broken in every cell.
    """
    lacks = [(least - cells[tone]).clip(lower=0) for tone, least in REACHED.items()]
    cells = cells.assign(lack=np.maximum(*lacks).astype(float))
    cells["steady"] = cells.groupby("layer")["lack"].shift(-1, fill_value=np.inf) + cells["lack"]
    sound = cells[(cells["ratio"] <= MAX_RATIO) & (cells["breaks"] <= MAX_BREAKS)]
    if sound.empty:
        raise ValueError(
            f"expected a cell with a perplexity ratio of at most {MAX_RATIO} in which at most"
            f" {MAX_BREAKS} % of the texts break, the lowest are {cells['ratio'].min():.2f} and"
            f" {cells['breaks'].min():.1f} %"
        )
    steady = sound[sound["steady"] == 0]
    best = (
        sound.sort_values(["lack", "share", "ratio"], kind="stable")
        if steady.empty
        else steady.sort_values(["share", "ratio"], kind="stable")
    ).iloc[0]
    return {"layer": int(best["layer"]), "coeff": round(float(best["coeff"]), 1)}


def sweep_additions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Sweep the four activation additions, each on several prompts, and choose their places.

    Returns:
        The place of each, and what was found by layer and coefficient: the share of completions
            in which each works, and the percentage of them that break visibly.
    """
    places, columns = {}, {}
    for name, shown in evaluate.DEMONSTRATIONS.items():
        rows = evaluate.demonstration_rows(
            model, tokenizer, shown, prompts.ADDITION_SWEEP_PROMPTS[name],
            ADDITION_LAYERS, ADDITION_COEFFS, ADDITION_PER_PROMPT, seed=4,
        )  # fmt: skip
        cells = rows[rows["kind"] == "steering"].groupby(["layer", "coeff"])
        share = 100 * cells[next(iter(shown.counted))].mean()
        broken = cells[["prompt", "completion"]].apply(evaluate.break_share)
        found = pd.DataFrame({"share": share, "breaks": broken})
        places[name] = choose_addition(found.reset_index())
        columns |= {name: share, f"{name}_breaks": broken}
    return places, pd.DataFrame(columns).reset_index()


def choose_addition(cells: pd.DataFrame) -> dict[str, Any]:
    """Choose the middle of the longest plateau, where other prompts may differ most.

    A plateau is a run of coefficients at one layer at which the share is within 5 points of the
    highest one, and no more than 4 % of the texts break. What lies beyond the grid is not known,
    and does not count. Of an even number the smaller middle is taken; among equally long plateaus
    the one with the higher mean share, then the earlier layer.

    Args:
        cells: `layer`, `coeff`, `share` and `breaks`, sorted by layer and coeff.

    Raises:
        ValueError: the text is broken in every cell.
    """
    sound = cells["breaks"] <= MAX_BREAKS
    if not sound.any():
        raise ValueError(
            f"expected a cell in which at most {MAX_BREAKS} % of the texts break, the lowest is"
            f" {cells['breaks'].min():.1f} %"
        )
    high = sound & (cells["share"] >= cells["share"][sound].max() - PLATEAU)
    begins = ~high | (cells["layer"].astype(int).diff() != 0)
    plateaus = [plateau for _, plateau in cells[high].groupby(begins.cumsum()[high])]
    longest = max(plateaus, key=lambda plateau: (len(plateau), plateau["share"].mean()))
    middle = longest.iloc[(len(longest) - 1) // 2]
    return {"layer": int(middle["layer"]), "coeff": float(middle["coeff"])}


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

    on, off = map(ratios, grammar.topic_sentences(TEXTS, *TOPIC_SENTENCES))
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


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Choose where the embedded model is steered.")
    shipped = "folder of a model (default: the shipped one)"
    parser.add_argument("--model", type=Path, default=FOLDER, help=shipped)
    parser.add_argument("--keep", action="store_true", help="leave preset.json as it is")
    options = parser.parse_args()
    try:
        card.need(options.model, "model.safetensors", *["preset.json"] * options.keep)
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer, _ = load_model(str(options.model))
    direction, directions = sweep_direction(model, tokenizer)
    additions, shares = sweep_additions(model, tokenizer)
    topic, ratios = sweep_topic(model, tokenizer)
    preset = {**direction, "activation_additions": additions, "topic": topic}
    preset["sha256"] = card.weights_hash(options.model)
    path = options.model / "preset.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if options.keep else preset
    text = "\n".join(
        [
            f"The rule gives layer {direction['layer']} with c = {direction['coeff']:g}; the preset"
            f" has layer {kept['layer']} with c = {kept['coeff']:g}.\n",
            *map(table, (directions, shares, ratios)),
        ]
    )
    print(text, f"\nchosen: {json.dumps(preset)}")
    if not options.keep:
        path.write_text(json.dumps(preset, indent=2) + "\n", encoding="utf-8")
    path = card.records_of(options.model) / "README.md"
    if card.has_place(path, "sweep"):
        card.write_between(path, "sweep", text)


if __name__ == "__main__":
    main()
