"""README and docs: snippets run as printed, links lead somewhere, every figure has its source."""

import contextlib
import io
import json
import re
import subprocess
from collections.abc import Iterator

import nbformat
import pytest
from architectures import ARCHITECTURES, ODD, RECURRENT
from odd_tokenizers import KINDS as TOKENIZERS

from benchmarks.ability_matrix import load_matrix
from common import completions, generate, train_steering_vector
from common.loading import known_preset
from common.measuring.tone import tone, tone_words
from embedded_model import prompts, report
from repository import agreement, readme
from repository.mechanisms import MECHANISMS, ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
CARD = (ROOT / "embedded_model/README.md").read_text(encoding="utf-8")
# Each with the page it is on, and the output that the page shows under it, if any.
SNIPPETS = [
    (page, *snippet)
    for page, text in PAGES.items()
    for snippet in re.findall(
        r"```python\n(.*?)```\n(?:\n[^`\n]*writes:\n\n```\n(.*?)```)?", text, re.DOTALL
    )
]


def stored(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def test_the_readme_takes_ten_minutes():
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("page", [*PAGES, "embedded_model/README.md"])
def test_links_lead_somewhere(page):
    """Every relative address of a page is a file of the project."""
    text = (ROOT / page).read_text(encoding="utf-8")
    addresses = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    folder = (ROOT / page).parent
    assert [it for it in addresses if "://" not in it and not (folder / it).exists()] == []


def test_the_readme_leads_to_every_page_and_notebook():
    notebooks = [*ROOT.glob("*.ipynb"), *ROOT.glob("guides/*.ipynb")]
    wanted = {path.relative_to(ROOT).as_posix() for path in notebooks} | set(PAGES)
    assert {it for it in wanted - {"README.md"} if f"]({it})" not in README} == set()


def test_named_paths_exist():
    """Each file and folder that a page names between backticks, and each line of the layout."""
    now = "\n".join(text for page, text in PAGES.items() if page != "CHANGELOG.md")
    named = re.findall(r"`([\w.-]+/[\w./-]*|[\w-]+\.(?:txt|toml|md|cff))`", now)
    named = [it for it in named if "/" not in it or (ROOT / it.split("/")[0]).exists()]
    layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    folders = re.findall(r"^(\w+/)(?:  (\w+/))?", layout, re.MULTILINE)
    named += [it for pair in folders for it in pair if it]
    assert len(folders) >= 6
    assert [it for it in named if not (ROOT / it).exists()] == []


def test_the_layout_names_every_folder():
    """Nothing at the root that holds Python or pictures goes without a line, but hidden ones."""
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    assert {it for it in folders if not it.startswith(".") and f"{it}/" not in layout} == set()


# --- snippets ---


@pytest.fixture(
    scope="module",
    params=range(len(SNIPPETS)),
    ids=[f"{page}, {re.split(r'[^a-z_]+', code)[3]}" for page, code, _ in SNIPPETS],
)
def snippet(request, tmp_path_factory) -> tuple[str, str, list[str]]:
    """A snippet, what its page shows under it, and what two runs in one clean folder print."""
    _, code, printed = SNIPPETS[request.param]
    found = []
    with pytest.MonkeyPatch.context() as reader:
        reader.chdir(tmp_path_factory.mktemp("reader"))
        reader.setenv("COLUMNS", "100")
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "a snippet", "exec"), {"__name__": "__main__"})
            found.append(out.getvalue().split("\n", 2)[2])  # two lines say what was loaded
    return code, printed, found


def test_a_snippet_runs_twice_and_prints_what_its_page_shows(snippet):
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


def test_the_first_screen_shows_what_the_model_writes(model, tokenizer):
    """Its texts are beginnings of greedy ones, clear in tone, with every word of a tone in bold."""
    head, _, *rows = re.findall(r"^\| (.*) \|$", README.split("\n## ")[0], re.MULTILINE)
    prompts = [cell.strip("* …") for cell in head.split(" | ")[1:]]
    preset = known_preset("embedded")
    vector = train_steering_vector(
        model, tokenizer, [("Love", "Hate")], layers=[preset.layer]
    ).unit()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assert len(rows) == 3 and len(prompts) >= 2
    for row, sign, by in zip(rows, (1, 0, -1), ("toward Love", "not at all", "toward Hate")):
        label, *shown = row.split(" | ")
        with vector.apply(model, multiplier=sign * preset.coeff):
            written = completions(tokenizer, inputs, generate(model, inputs, max_new_tokens=40))
        assert label == by
        for cell, text in zip(shown, written, strict=True):
            plain = cell.replace("**", "")
            assert text.strip().startswith(plain) and plain.endswith(".")
            counted = [value for _, value in tone_words(plain)]
            assert len(counted) == cell.count("**") / 2 and set(counted) == {sign} - {0}
            assert all(tone_words(word) for word in re.findall(r"\*\*(.+?)\*\*", cell))


def test_all_kinds_of_snippets_are_there():
    """None of the tests above is empty: the README steers by a vector, a page by an addition."""
    assert any(
        "apply(" in code and printed for page, code, printed in SNIPPETS if page == "README.md"
    )
    assert any("print_n_comparisons" in code for _, code, _ in SNIPPETS)


def test_commands_exist():
    """Each `make` target and each module that a page names."""
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", ALL, re.MULTILINE))
    assert {"run", "test", "lint", "lab", "notebooks", "update"} <= named <= targets
    modules = set(
        re.findall(r"python -m ((?:common|benchmarks|repository|embedded_model)[\w.]+)", ALL)
    )
    files = set(re.findall(r"\btests/[\w/]+\.py", ALL))
    assert len(files) >= 3
    wanted = {module.replace(".", "/") + ".py" for module in modules} | files
    assert {path for path in wanted if not (ROOT / path).is_file()} == set()


# --- figures ---


def percent(*ratios: float) -> str:
    return " to ".join(f"{100 * (ratio - 1):.0f}" for ratio in (min(ratios), max(ratios))) + " %"


def mechanism_figures() -> Iterator[str]:
    """The tables of the six, and what is said of their costs."""
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
        yield f" | {largest_difference(small, name)} |"
        if name not in large["times"]:  # a new one
            continue
        yes = cells[cells["mechanism"] == name]["outcome"] == "yes"
        yield (
            f"| {name} | {ratios['large'][name][1]:.2f} / {ratios['small'][name][1]:.2f} |"
            f" {yes.sum()} of {len(yes)} |"
        )
    lens = "transformer_lens"
    yield (
        f"TransformerLens ({percent(*ratios['large'][lens])} in fp32,"
        f" {percent(*ratios['half'][lens])} in bf16)"
    )
    edited = ratios["large"]["bias_editing"]
    yield f"bars lie between {min(edited):.2f} and {max(edited):.2f}"
    slower = ratios["small"][lens]
    yield f"TransformerLens takes {min(slower):.1f} to {max(slower):.1f} times as"
    slower = ratios["small"]["nnsight"]
    yield f"nnsight {min(slower):.1f} to {max(slower):.1f} times"
    measured = [name for name in MECHANISMS if name in large["times"]]
    reads = [large["times"][name]["read"]["median"] for name in measured]
    yield f"within {100 * max(abs(value - 1) for value in reads):.0f} %"
    most = max(abs(large["memory"][name]) for name in measured)
    yield f"none adds memory ({100 * most:.1f} % of"
    yield (
        f"TransformerLens weigh {100 * small['memory'][lens]:.1f} % of it and those of nnsight"
        f" {100 * small['memory']['nnsight']:.1f} %"
    )
    assert all(abs(small["memory"][name]) < 0.01 for name in set(measured) - {lens, "nnsight"})
    assert small["memory"]["transformer_lens, deep copy"] > 1


def largest_difference(model: dict, name: str) -> str:
    """As the table of the six writes it; the reference has none, what is not measured says so."""
    if name == agreement.REFERENCE:
        return "–"
    pairs = [it for it in model["agreement"] if {it["a"], it["b"]} == {name, agreement.REFERENCE}]
    if not pairs:
        return "not measured yet"
    found = pairs[0]["largest difference"]
    return f"{found:.1e}".replace("e-0", "e-") if found else "0"


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
    early = [row["faster than the peer"] for row in found["extraction"] if row["layers"] != "all"]
    yield f"Training one early layer is {min(early):.1f} to {max(early):.1f} times as fast"
    small, large = found["steering"]
    yield (
        f"{large['of unsteered']:.2f} times as long as without at GPT2-XL shape, and"
        f" {small['of unsteered']:.2f} with the embedded model"
    )
    many = found["many pairs"]
    yield f"{many['pairs']:,} pairs of {many['tokens']:.0f} tokens took {many['seconds']:.0f} s"
    yield f"{many['peak memory added, GiB']:.1f} GiB"


def sweep_figures() -> Iterator[str]:
    """A sweep beside one run each."""
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


def scale_figures() -> Iterator[str]:
    """An engine beside none, and a sweep on paper."""
    found = stored("benchmarks/results/scale.json")
    engine, driver = found["engine"], found["driver"]
    assert engine["same rows"] and found["machine"]["threads"] == "1"
    yield f"{engine['rows']:,} completions of the embedded model"
    yield f"takes {engine['one worker, of none']['median']:.2f} times as long as no engine"
    yield f"two are {engine['two workers, of one']['median']:.2f} times as fast as one"
    yield f"are {engine['two processes, of one']['median']:.2f} times as fast"
    yield f"takes {driver['bytes per row']:.0f} bytes"
    per_second = driver["rows per second into the file"]
    yield f"writes {per_second:,.0f}"[:-3] + "000 rows a second"
    yield f"cuts {driver['rows per second cut'] / 1e6:.1f} million a second"
    rows = (1 + 3) * 48 * 20 * 200 * 10 + 200 * 10
    yield f"{rows / 1e6:.1f} million"
    most = int(per_second // 1000)
    for gpus in (1, 8, 64, most):
        minutes = 1 + rows / 1000 / gpus / 60
        hours = gpus * minutes / 60
        time = f"{minutes / 60:.0f} h {minutes % 60:.0f} min" if gpus == 1 else f"{minutes:.0f} min"
        if gpus == most:
            yield f"| more than {most} | about {time} | more than {hours:.1f} |"
        else:
            yield f"| {gpus} | {time} | {hours:.1f} |"


def test_the_embedded_model_of_the_stored_figures_is_as_wide_as_that_of_today(model):
    costs = stored("benchmarks/results/mechanisms.json")["models"]["embedded"]
    training = stored("benchmarks/results/extraction.json")
    sweeps = stored("benchmarks/results/sweep.json")["sweeps"]
    embedded = [row for row in training["steering"] + sweeps if row["model"] == "embedded"]
    assert len(embedded) > 2
    widths = {row["d_model"] for row in (costs, training["many pairs"], *embedded)}
    assert widths == {model.config.n_embd}


def counts(model) -> Iterator[str]:
    """What can be counted, in digits or in words."""
    yield f"{model.num_parameters() / 1e6:.2f} million parameters"
    yield f"agree within {agreement.TOLERANCE:.0e} on every logit".replace("e-0", "e-")
    points = readme.PER_PROMPT * len(prompts.TABLE_PROMPTS)
    yield f"{points} sampled completions for each point"
    yield f"which of {load_matrix()['ability'].nunique()} abilities each has"
    words = {5: "five", 6: "six", 10: "ten", 12: "twelve", 20: "twenty"}
    cells = nbformat.read(ROOT / "guides/failures.ipynb", as_version=4).cells
    exhibits = sum(bool(re.match(r"## \d+ ", cell.source)) for cell in cells)
    yield f"{words[exhibits]} silent mistakes"
    yield f"with {words[len(TOKENIZERS)]} kinds of tokenizer"
    assert len(ARCHITECTURES | ODD | RECURRENT) > 20
    yield f"on tiny models of more than {words[20]} architectures"


def added_figures() -> Iterator[str]:
    """What steering adds, and that the control and what is like it include nothing."""
    found = stored("benchmarks/results/added_costs.json")["sizes"]["gpt2-xl shape"]["added"]
    ends = {name: [100 * end - 100 for end in one["ratio"][1:]] for name, one in found.items()}
    low, high = ends.pop("nnsight")
    yield f"nnsight adds {low:.1f} to {high:.1f} % at that size"
    assert ends.pop("transformer_lens")[0] > 0
    assert len(ends) == 5 and all(low < 0 < high for low, high in ends.values())


@pytest.fixture(scope="module")
def figures(model) -> list[str]:
    """Every measured figure of the pages, with the words that say what it is."""
    return [
        *mechanism_figures(),
        *extraction_figures(),
        *sweep_figures(),
        *scale_figures(),
        *added_figures(),
        *counts(model),
    ]


def flat(text: str) -> str:
    """Without the line breaks inside a paragraph."""
    return re.sub(r"(?<![|\n])\n *(?=[^\n| ])", " ", text)


def test_figures_of_the_pages_are_those_of_the_files(figures):
    """Each is written as the file has it."""
    assert [figure for figure in figures if figure not in flat(ALL)] == []


@pytest.mark.parametrize("name", MECHANISMS)
def test_each_of_the_six_has_its_own_difference(name):
    """Its row ends in the difference that was measured."""
    (row,) = [line for line in README.splitlines() if line.startswith(f"| [{name}]({name}.ipynb)")]
    found = stored("benchmarks/results/mechanisms.json")["models"]["embedded"]
    assert row.endswith(f" | {largest_difference(found, name)} |")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_other_figures(figures, page):
    """What is left without them holds no ratio, share or decimal number that is a measurement."""
    rest = flat(re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    # addresses, and what stands for a picture
    rest = re.sub(r"\]\([^)]*\)|!\[[^\]]*\]|https?://\S+", "", rest)
    for figure in figures:
        rest = rest.replace(figure, "")
    # the table of what was run, by versions
    rest = re.sub(r"^\| 3\.1\d \|.*$", "", rest, flags=re.MULTILINE)
    rest = re.sub(r"Python 3\.\d+(?:, 3\.\d+)*(?: and 3\.\d+)?|Apache-2\.0|6\.2 GB", "", rest)
    assert re.findall(r".{0,30}\d+(?:\.\d+)?\s?(?:×|%|points)|.{0,30}\b\d+\.\d+\b", rest) == []


def test_figures_of_the_card_are_those_of_the_evaluation(model):
    """Its tables are what `evaluate` writes of the files beside it."""
    assert f"{model.num_parameters() / 1e6:.2f} million parameters" in CARD
    between = {
        name: re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", CARD, re.DOTALL)[1].strip()
        for name in ("table", "seeds")
    }
    assert between["table"] == report.markdown(stored("embedded_model/evaluation.json")).strip()
    if between["seeds"] != "Not measured yet.":
        seeds = stored("embedded_model/seeds.json")
        assert between["seeds"] == report.comparison(seeds).strip()
