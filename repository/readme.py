"""Draws the picture of the README: how the tone depends on the coefficient."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.loading import LoadError, load_model
from common.measuring.effects import effect_by_cell
from common.measuring.tone import tone_sign
from common.plots import plot_effect
from common.sweeping.grid import Grid
from common.sweeping.sweep import sweep
from common.texts.sampling import Sampling
from common.vectors.steering_vector import model_name
from common.vectors.training import train_steering_vector
from embedded_model import prompts

PICTURE = Path(__file__).resolve().parent.parent / "pictures" / "tone_over_coefficient.png"
PER_PROMPT = 15  # completions of each prompt in the picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw how the tone depends on the coefficient, for the README."""
    parser = argparse.ArgumentParser(prog="python -m repository.readme", description=main.__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=PICTURE,
        help="the PNG to write (default: the picture of the README)",
    )
    options = parser.parse_args(arguments)
    try:
        model, tokenizer, preset = load_model()
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    coeffs = [round(preset.coeff * step / 4, 2) for step in range(-6, 7) if step]
    vector = train_steering_vector(
        model, tokenizer, [("Love", "Hate")], layers=[preset.layer]
    ).unit()
    rows = sweep(
        model,
        tokenizer,
        Grid({"Love - Hate": vector}, [preset.layer], coeffs, random_controls=10),
        prompts.TABLE_PROMPTS,
        {"tone": tone_sign},
        sampling=Sampling(max_new_tokens=24, top_p=0.9),
        per_prompt=PER_PROMPT,
    )
    name = model_name(model).replace("embedded", "embedded model")
    title = f"{name}, {len(prompts.TABLE_PROMPTS) * PER_PROMPT} completions for each point"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure = plot_effect(
        rows, "tone", preset.layer, "share of positive minus negative completions", title
    )
    figure.savefig(options.out, dpi=120)
    print(effect_by_cell(rows, "tone").to_string(index=False, float_format="%.2f"))
    print("Picture:", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
