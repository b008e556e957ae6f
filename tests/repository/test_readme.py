"""README and model card: every snippet runs as it is printed, and every figure stands in a file that a command writes."""

import contextlib
import io
import json
import re
import statistics
from collections.abc import Iterator

import pytest

from benchmarks.ability_matrix import load_matrix
from common.measuring.tone import tone
from embedded_model import evaluate
from repository.mechanisms import MECHANISMS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "embedded_model/README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", README, re.DOTALL)
COMMANDS = re.findall(r"```\n((?:make|python -m) .*?)```", README, re.DOTALL)


def stored(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


# --- snippets ---


@pytest.fixture(
    scope="module",
    params=range(len(SNIPPETS)),
    ids=[re.split(r"\W+", code)[3] for code, _ in SNIPPETS],
)
def snippet(request, tmp_path_factory) -> tuple[str, str, list[str]]:
    """A snippet, what the README prints below it, and what two runs in one clean folder print."""
    code, printed = SNIPPETS[request.param]
    found = []
    with pytest.MonkeyPatch.context() as reader:
        reader.chdir(tmp_path_factory.mktemp("reader"))
        reader.setenv("COLUMNS", "100")
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
            found.append(out.getvalue().partition("\n")[2])  # the first line says what was loaded
    return code, printed, found


def test_a_snippet_runs_twice_and_prints_what_the_readme_shows(snippet):
    """In a clean folder, and again in the folder that the first run left."""
    _, printed, found = snippet
    assert found[0] == found[1]
    assert not printed or found[0] == printed


def test_a_snippet_that_steers_shows_it(snippet):
    """Steered beside unsteered, with tones that differ."""
    code, _, (output, _) = snippet
    if "print_n_comparisons" in code:
        cells = [
            [cell.strip() for cell in line.strip("│").split("│")]
            for line in output.splitlines()
            if line.startswith("│")
        ]
        unsteered, steered = (" ".join(column) for column in zip(*cells))
        assert tone(unsteered) < 0 < tone(steered)
    elif "apply(" in code:
        plain, plus, minus = output.splitlines()
        assert tone(minus) < tone(plain) < tone(plus)


def test_all_kinds_of_snippets_are_there():
    """One that steers by a vector, one by an addition, one that loads; so that none of the tests above is empty."""
    assert (
        len(SNIPPETS) >= 3
        and any("apply(" in code for code, _ in SNIPPETS)
        and any("print_n_comparisons" in code for code, _ in SNIPPETS)
    )


def test_commands_exist():
    """Each `make` target and each module that the README names."""
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", README, re.MULTILINE))
    assert {"run", "test", "lab"} <= named <= targets
    modules = set(re.findall(r"python -m ((?:common|benchmarks)[\w.]+)", README))
    assert modules and all(
        (ROOT / (module.replace(".", "/") + ".py")).is_file() for module in modules
    )


# --- figures ---


def percent(*ratios: float) -> str:
    return " to ".join(f"{100 * (ratio - 1):.0f}" for ratio in (min(ratios), max(ratios))) + " %"


def mechanism_figures() -> Iterator[str]:
    """The table of the six, and what is said of their costs."""
    found = stored("benchmarks/results/mechanisms.json")["models"]
    small, large, half = (
        found[name] for name in ("embedded", "gpt2-xl shape", "gpt2-xl shape, bf16")
    )
    cells = load_matrix()
    kinds = ("forward", "per token, batch 1", "per token, batch 8")
    ratios = {
        size: {
            name: [row[kind]["median"] for kind in kinds] for name, row in model["times"].items()
        }
        for size, model in (("small", small), ("large", large), ("half", half))
    }
    for name in MECHANISMS:
        (difference,) = [
            pair["largest difference"]
            for pair in small["agreement"]
            if {pair["a"], pair["b"]} == {name, "pytorch_hooks"}
        ] or [None]
        difference = (
            "–"
            if difference is None
            else f"{difference:.1e}".replace("e-0", "e-")
            if difference
            else "0"
        )
        mine = cells[cells["mechanism"] == name]["outcome"]
        yield (
            f"| {difference} | {ratios['large'][name][1]:.2f} / {ratios['small'][name][1]:.2f} |"
            f" {(mine == 'yes').sum()} of {len(mine)} |"
        )
    lens = "transformer_lens"
    yield (
        f"TransformerLens ({percent(*ratios['large'][lens])} in fp32,"
        f" {percent(*ratios['half'][lens])} in bf16)"
    )
    yield "bars lie between {:.2f} and {:.2f}".format(
        min(ratios["large"]["bias_editing"]), max(ratios["large"]["bias_editing"])
    )
    yield "TransformerLens takes {:.1f} to {:.1f} times as".format(
        min(ratios["small"][lens]), max(ratios["small"][lens])
    )
    yield "nnsight {:.1f} to {:.1f} times".format(
        min(ratios["small"]["nnsight"]), max(ratios["small"]["nnsight"])
    )
    reads = [large["times"][name]["read"]["median"] for name in MECHANISMS]
    yield f"within {100 * max(abs(value - 1) for value in reads):.0f} %"
    yield (
        f"none adds memory ({max(abs(large['memory'][name]) for name in MECHANISMS):.1%} of".replace(
            "%", " %"
        )
    )
    yield (
        f"TransformerLens weigh {100 * small['memory'][lens]:.1f} % of it and those of nnsight"
        f" {100 * small['memory']['nnsight']:.1f} %"
    )
    assert all(abs(small["memory"][name]) < 0.01 for name in set(MECHANISMS) - {lens, "nnsight"})
    assert small["memory"]["transformer_lens, deep copy"] > 1


def extraction_figures() -> Iterator[str]:
    """Training beside steering-vectors."""
    found = stored("benchmarks/results/extraction.json")
    rows = {(row["shape"], row["layers"]): [] for row in found["extraction"]}
    for row in found["extraction"]:
        rows[row["shape"], row["layers"]].append(row)
        assert row["largest difference"] == 0
    for (shape, layers), pair in rows.items():
        name = {"gpt2-xl": "GPT2-XL shape", "gpt2-small": "GPT-2-small shape"}[shape]
        assert [row["batch"] for row in pair] == [1, 8]
        faster, bare = (
            [row[key] for row in pair] for key in ("faster than the peer", "of the bare blocks")
        )
        where = "all layers" if layers == "all" else f"layer {layers}"
        yield (
            f"| {name}, {where}, batch 1 / 8 | {faster[0]:.1f}× / {faster[1]:.1f}× | {bare[0]:.2f}"
            f" / {bare[1]:.2f} |"
        )
    yield f"faster than steering-vectors {found['peer']['steering-vectors']} |"
    small, large = found["steering"]
    yield (
        f"{large['of unsteered']:.2f} times as long as without at GPT2-XL shape, and"
        f" {small['of unsteered']:.2f} with the embedded model"
    )
    many = found["many pairs"]
    yield f"{many['pairs']:,} pairs of {many['tokens']:.0f} tokens took {many['seconds']:.0f} s"
    yield f"{many['peak memory added, GiB']:.1f} GiB"


def sweep_figures() -> Iterator[str]:
    """A sweep beside one run each, and the table of perplexities."""
    found = stored("benchmarks/results/sweep.json")["sweeps"]
    for row in found:
        name = {"embedded": "embedded model", "gpt2-small shape": "GPT-2-small shape"}[row["model"]]
        what = {"completions": "completions", "logits": "next tokens"}[row["kind"]]
        prompt, setting = row["faster than each prompt"], row["faster than each setting"]
        more = " of 16 tokens" if row["model"] == "embedded" and what == "completions" else ""
        yield (
            f"| {name}, {row['rows']} {what}{more} | {prompt:.{0 if prompt > 10 else 1}f}× |"
            f" {setting:.1f}× |"
        )
    each = [found[0][f"spread, each {what}"] for what in ("setting", "prompt")]
    yield "between {:.1f}× and {:.1f}×, and between {:.0f}× and {:.0f}×".format(*each[0], *each[1])
    topic = {
        (row["condition"], row["text"]): row["ratio"]
        for row in stored("embedded_model/evaluation.json")["topic"]
    }
    for condition, label in (("steering", "added"), ("prompting", "in the prompt")):
        yield (
            f'| " weddings" {label}, embedded model | {topic[condition, "on topic"]:.2f} |'
            f" {topic[condition, 'off topic']:.2f} |"
        )
    published = stored("repository/data/demonstrations.json")["topic"]["published"]
    on, off = (
        [published[how][text] for how in ("steering", "prompting")]
        for text in ("on topic", "off topic")
    )
    yield "published | {:.3f}, {:.3f} | {:.3f}, {:.3f} |".format(*on, *off)


@pytest.fixture(scope="module")
def figures(model) -> list[str]:
    """Every measured figure of the README, with the words that say what it is."""
    others = [f"{model.num_parameters() / 1e6:.2f} million parameters"]
    return [*mechanism_figures(), *extraction_figures(), *sweep_figures(), *others]


def test_figures_of_the_readme_are_those_of_the_files(figures):
    """Each is written as the file has it."""
    assert [figure for figure in figures if figure not in README] == []


def test_the_readme_has_no_other_figures(figures):
    """What is left without them holds no ratio, share or decimal number, but those that are no measurements."""
    rest = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    rest = re.sub(
        r"\]\([^)]*\)|!\[[^\]]*\]|https?://\S+", "", rest
    )  # addresses, and what stands for a picture
    for figure in figures:
        rest = rest.replace(figure, "")
    rest = re.sub(
        r"^\| 3\.1\d \|.*$", "", rest, flags=re.MULTILINE
    )  # the table of what was run, by versions
    rest = re.sub(r"Python 3\.\d+|Apache-2\.0|6\.2 GB", "", rest)
    assert re.findall(r".{0,30}\d+(?:\.\d+)?\s?(?:×|%|points)|.{0,30}\b\d+\.\d+\b", rest) == []


def test_figures_of_the_card_are_those_of_the_evaluation(model):
    """Its table is what `evaluate` writes, and what is said above the table are figures of the same file."""
    assert f"{model.num_parameters() / 1e6:.2f} million parameters" in CARD
    found = stored("embedded_model/evaluation.json")
    between = re.search(r"<!-- table -->\n(.*?)\n<!-- /table -->", CARD, re.DOTALL)[1]
    assert between.strip() == evaluate.markdown(found).strip()
    direction = found["direction"]
    randoms, pairs = (
        [abs(move) for move in moves]
        for moves in (direction["random_moves"], direction["pair_moves"].values())
    )
    base = direction["unsteered"]["positive"]
    said = " ".join(CARD.partition("## Files")[0].split())
    for moves, words in (
        (
            randoms,
            (
                "of {} random ones the median moves the share of positive texts by {:.1f} points"
                " and the worst by {:.1f}"
            ),
        ),
        (pairs, "of {} unrelated word pairs {:.1f} and {:.1f}"),
    ):
        assert words.format(len(moves), statistics.median(moves), max(moves)) in said
    assert (
        f"by {direction['love']['positive'] - base:.1f} up and"
        f" {base - direction['hate']['positive']:.1f} down" in said
    )
