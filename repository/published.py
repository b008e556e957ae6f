"""The figures a model must show: published ones of GPT2-XL, recorded ones of the embedded model.

They lie in `repository/data/<model>.json`: the norms of the Love-Hate vector at resid_post and at
the output of `ln_1`, and the greedy texts. `python -m repository.published gpt2-xl` measures them
again and compares.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.loading import LoadError, known_preset, load_model
from common.texts.generation import completions
from repository.mechanisms import load_mechanism, notebook_namespace

DATA = Path(__file__).resolve().parent / "data"
SITES = ("resid_post", "ln_1")


def read_figures(name: str) -> dict:
    """Return the figures stored for a model, with the layer and coefficient of its preset.

    Raises:
        ValueError: nothing is stored for it.
    """
    name = name.split("/")[-1]
    path = DATA / f"{name}.json"
    if not path.is_file() or "norms" not in json.loads(path.read_text(encoding="utf-8")):
        known = ", ".join(
            sorted(
                file.stem for file in DATA.glob("*.json") if "norms" in json.loads(file.read_text())
            )
        )
        raise ValueError(f"no figures are stored for {name!r}: expected one of {known}")
    preset = known_preset(name)
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {"layer": preset.layer, "coeff": preset.coeff} | stored


def published_markdown(*sites: str) -> str:
    """Return a Markdown table of what the same steps printed on GPT2-XL: published, not run here.

    Args:
        sites: `"resid_post"`, and `"ln_1"` for the edit of `c_attn`'s bias.

    Raises:
        ValueError: another site.
    """
    if not sites or not set(sites) <= set(SITES):
        raise ValueError(f"no published texts for {sites}: expected some of {', '.join(SITES)}")
    figures = read_figures("gpt2-xl")
    rows = [("unsteered", figures["completions"]["unsteered"])]
    for site in sites:
        rows += [
            (f"{sign}{figures['coeff']:g} at {site}", text)
            for sign, text in figures["completions"][site].items()
        ]
    # The published texts begin with a non-breaking space; a table is no place to look for it.
    lines = [f"| {label} | {text.replace(chr(0xA0), ' ').strip()} |" for label, text in rows]
    head = [f"| GPT2-XL, published | after {figures['prompt']!r} |", "| :--- | :--- |"]
    address = figures["source"].split()[0]
    return "\n".join([*head, *lines, "", f"Source: [{figures['source_short']}]({address})."])


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, expected: dict) -> dict:
    """Measure the figures of a model, with the settings of `expected`.

    resid_post is read and steered with plain hooks, the output of `ln_1` by editing `c_attn`'s
    bias, as published.

    Args:
        model: a GPT-2.
        tokenizer: its tokenizer; "Love" and "Hate" are read at their last token, without BOS.
        expected: `layer`, `coeff`, `prompt` and `max_new_tokens`, as stored.

    Returns:
        `norms` and `completions`, in the form they are stored.
    """
    hooks, bias = load_mechanism("pytorch_hooks"), notebook_namespace("bias_editing")
    sites = {
        "resid_post": (hooks.read, hooks.steer),
        "ln_1": (bias["read_ln_1"], bias["steer_ln_1"]),
    }
    layer, inputs = (
        expected["layer"],
        tokenizer([expected["prompt"]], return_tensors="pt").to(model.device),
    )

    def complete() -> str:
        ids = hooks.generate(model, inputs, max_new_tokens=expected["max_new_tokens"])
        return completions(tokenizer, inputs, ids)[0]

    found: dict = {"norms": {}, "completions": {"unsteered": complete()}}
    for site, (read, steer) in sites.items():
        love, hate = (
            read(model, tokenizer(word, return_tensors="pt").to(model.device), layer)[0, -1]
            for word in ("Love", "Hate")
        )
        vector = love - hate  # [d_model]
        found["norms"][site] = round(vector.norm().item(), 2)
        found["completions"][site] = {}
        for sign, coeff in (("+", expected["coeff"]), ("-", -expected["coeff"])):
            with steer(model, layer, coeff * vector / vector.norm()):
                found["completions"][site][sign] = complete()
    return found


def compare(measured: dict, expected: dict) -> pd.DataFrame:
    """Put measured figures beside expected ones.

    Norms may differ by 0.01, their last digit. Texts must be the same, but for space around them:
    the published ones begin with a non-breaking space.

    Returns:
        One row for each figure: `figure`, `expected`, `measured`, `agrees`.
    """
    rows = [
        (
            f"norm at {site}",
            norm,
            measured["norms"][site],
            abs(norm - measured["norms"][site]) < 0.0101,
        )
        for site, norm in expected["norms"].items()
    ]
    rows += [
        (figure, text, other, text.split() == other.split())
        for (figure, text), (_, other) in zip(_texts(expected), _texts(measured), strict=True)
    ]
    return pd.DataFrame(rows, columns=["figure", "expected", "measured", "agrees"])


def _texts(figures: dict) -> list[tuple[str, str]]:
    """Flatten the completions into (what, text) in a fixed order."""
    texts = figures["completions"]
    return [("unsteered", texts["unsteered"])] + [
        (f"{site} {sign}", texts[site][sign]) for site in SITES for sign in "+-"
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure a model's figures and compare; return 0 only if all agree."""
    parser = argparse.ArgumentParser(
        prog="python -m repository.published", description=main.__doc__
    )
    parser.add_argument("model", help="a model with stored figures: gpt2-xl or embedded")
    parser.add_argument(
        "--record", action="store_true", help="store what was measured as the new expected figures"
    )
    options = parser.parse_args(arguments)
    try:
        expected = read_figures(options.model)
        model, tokenizer, _ = load_model(options.model)
    except (LoadError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.record:
        expected |= measure(model, tokenizer, expected)
        stored = {key: value for key, value in expected.items() if key not in ("layer", "coeff")}
        text = json.dumps(stored, indent=1, ensure_ascii=True)
        (DATA / f"{options.model}.json").write_text(text + "\n", encoding="utf-8")
    rows = compare(measure(model, tokenizer, expected), expected)
    table = Table(*rows.columns, title=f"{options.model}, expected: {expected['source']}")
    for row in rows.itertuples(index=False):
        table.add_row(
            row.figure, repr(row.expected), repr(row.measured), "yes" if row.agrees else "NO"
        )
    Console().print(table)
    return 0 if rows["agrees"].all() else 1


if __name__ == "__main__":
    sys.exit(main())
