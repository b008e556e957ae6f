"""The benchmarks measure what they say: the same work on both sides. No times are compared here."""

from itertools import combinations

import pandas as pd
import pytest
import torch

from benchmarks.charts import Panel, plot_ratios
from benchmarks.logit_differences import pairwise, plot_agreement
from benchmarks.mechanism_costs import asked, cost_table, count_lines, lines_of_code, plot_cost
from benchmarks.profiling import KERNELS, OTHER, OWN, owner_of, plot_profile, shares
from benchmarks.shapes import WORDS, random_pairs, word_tokenizer
from benchmarks.stored import provenance
from benchmarks.sweep_costs import Ways, embedded_grid
from benchmarks.timing import interleaved, peak_memory, ratio
from benchmarks.training_costs import bare_blocks
from benchmarks.workbench import TIMES, XL, Workbench, cases
from common.texts.generation import logits
from common.vectors.steering_vector import SteeringVector
from repository.mechanisms import MECHANISMS


def test_bare_blocks_are_the_models(model):
    """The least that training can cost is what the model computes up to that layer."""
    ids, caught, passed = torch.tensor([[5, 6, 7], [8, 9, 10]]), [], []
    handles = [
        model.transformer.h[2].register_forward_hook(lambda m, args, out: caught.append(out)),
        model.transformer.h[3].register_forward_hook(lambda m, args, out: passed.append(out)),
    ]
    bare_blocks(model, [ids], 2)
    assert len(caught) == 1 and not passed
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(caught[0], caught[1])


@pytest.mark.parametrize(("quick", "count"), [(True, 4), (False, 20)])
def test_the_sweep_that_is_measured_has_so_many_prompts(quick, count):
    ways = embedded_grid(quick)
    assert len(set(ways.prompts)) == len(ways.prompts) == count


def test_prompts_have_the_length_they_are_said_to_have():
    """16 pairs of 16 tokens, all different, the same every time."""
    pairs = random_pairs(16, 16)
    prompts = [prompt for pair in pairs for prompt in pair]
    assert len(set(prompts)) == 32 and pairs == random_pairs(16, 16)
    assert {len(ids) for ids in word_tokenizer()(prompts)["input_ids"]} == {16}
    assert word_tokenizer().decode(word_tokenizer()(WORDS[7])["input_ids"]) == WORDS[7]


def test_ways_take_turns():
    """Each way runs once more than it counts, in changing order, and may time itself."""
    order = []
    seconds = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 0.5}, 2, "test"
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds["b"] == [0.5, 0.5] and len(seconds["a"]) == 2


def test_ratio_is_the_median_of_the_rounds():
    """Round by round, with quartiles around it."""
    assert ratio([2.0, 6.0, 4.0], [2.0, 2.0, 2.0])[0] == pytest.approx(2.0)
    assert ratio([1.0], [2.0]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("kind", ["completions", "logits"])
def test_three_ways_of_a_sweep_do_the_same(model, tokenizer, kind):
    """The same cells, and the same texts or divergences, whichever way they are computed."""
    vector = SteeringVector(
        {
            layer: torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(layer))
            for layer in (1, 4)
        }
    )
    grid = Ways(model, tokenizer, vector, [-2.0, 2.0], ["I think dogs are", "You"])
    for way in grid.ways(kind).values():
        way()
    own = grid.found["sweep"]
    assert len(own) == 8 and len({str(value) for value in own.values()}) > 4
    for way in ("each setting", "each prompt"):
        assert grid.found[way].keys() == own.keys()
        same = [
            own[key] == other if kind == "completions" else abs(own[key] - other) < 1e-4
            for key, other in grid.found[way].items()
        ]
        assert all(same)


@pytest.fixture(scope="module")
def cost() -> Workbench:
    """The embedded model, as the costs of the mechanisms are measured on it."""
    return Workbench(cases("cpu", quick=True)[0], "cpu")


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_counts_as_steered_is_steered(cost, name):
    """The pass that is timed gives the steered logits, and the tokens are as many as it is said."""
    with cost.steered("pytorch_hooks"):
        expected = logits(cost.model, cost.inputs(1))
    with cost.steered(name):
        torch.testing.assert_close(cost.work(name, "forward")(), expected, rtol=0, atol=1e-4)
        assert cost.work(name, "per token, batch 8")().shape == (8, 8 + cost.case.new_tokens)
    unsteered = cost.work("unsteered", "forward")()
    assert (unsteered - expected).abs().max() > 1
    torch.testing.assert_close(cost.work(name, "forward")(), unsteered, rtol=0, atol=1e-4)
    hidden = cost.mechanisms["pytorch_hooks"].read(cost.model, cost.inputs(8, 16), cost.case.layer)
    torch.testing.assert_close(cost.work(name, "read")(), hidden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", TIMES)
def test_every_kind_of_cost_takes_time(cost, kind):
    """Each of the six and the unsteered model can be timed."""
    assert all(cost.time(name, kind) > 0 for name in ("unsteered", *MECHANISMS))


def test_mechanisms_agree(cost):
    """Every pair is there once, and their logits are equal but for rounding."""
    found = cost.agreement()
    assert {frozenset((pair["a"], pair["b"])) for pair in found} == {
        frozenset(pair) for pair in combinations(MECHANISMS, 2)
    }
    assert max(pair["largest difference"] for pair in found) < 1e-4


def test_differences_of_pairs():
    """A tensor differs from itself by 0, and from another one equally in both directions."""
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])
    assert [
        pair["largest difference"] for pair in pairwise({"a": one, "b": one.clone(), "c": other})
    ] == [0, 3, 3]
    assert pairwise({"c": other, "a": one})[0]["largest difference"] == 3


def test_picture_of_agreement():
    """A figure for each pair, and 0 where two are identical."""
    figure = plot_agreement(
        {"here": pairwise({"a": torch.ones(1), "b": torch.ones(1), "c": 1 + torch.tensor([1e-4])})}
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1e-4", "1e-4"]


def test_picture_of_ratios():
    """A bar with its figure for each row, none without a value; a mark where asked."""
    rows = [{"ratio": 2.5, "spread": (2, 3), "asked": 4}, {"ratio": 1.0, "spread": (1, 1)}, {}]
    panels = [Panel("ratio", "spread", "asked", "times"), Panel("other", "spread", "-", "other")]
    left, right = plot_ratios(rows, ["a", "b", "c"], panels, "Both").axes
    assert [text.get_text() for text in left.texts] == ["2.5", "1"] and not right.texts
    marks = [line for line in left.lines if list(line.get_xdata()) == [4, 4]]
    assert len(marks) == 1 and left.get_xlabel() == "times"


def test_lines_of_code():
    """Neither blank lines nor comments nor imports count, nor the imports that are only tried."""
    imports = (
        "import a\nfrom b import (\n    c,\n)\n\ntry:\n    import d\nexcept ImportError:  # not"
        " there\n    from e import d\n"
    )
    assert count_lines(imports + "\n# why\nx = 1  # counts\n") == 1
    assert count_lines("try:\n    x = 1\nexcept ValueError:\n    import a\n") == 4
    assert all(lines_of_code(name) > 5 for name in MECHANISMS)


@pytest.mark.skipif(
    peak_memory(lambda: None) is None, reason="only Linux counts the peak from a moment on"
)
def test_peak_memory_sees_what_is_allocated_meanwhile():
    """64 MB that are allocated and freed are seen; those that were freed before are not."""
    before = torch.ones(64 * 2**18)
    del before
    assert abs(peak_memory(lambda: None)) < 8 * 2**20
    assert 60 * 2**20 < peak_memory(lambda: torch.ones(64 * 2**18)) < 80 * 2**20


def made_up(slower: float) -> dict:
    """A result of a measurement, of two mechanisms and a peer."""
    one = {"median": slower, "low": slower - 0.1, "high": slower + 0.1, "seconds": 0.5}
    times = {name: dict.fromkeys(TIMES, one) for name in ("unsteered", *MECHANISMS)}
    model = {
        "d_model": 7,
        "times": times,
        "memory": {"baukit": 0.01, "transformer_lens": 0.3},
        "peers": {"repeng": dict.fromkeys(TIMES[2:5], one)},
    }
    profile = {"unsteered": {"milliseconds": 2.0, "packages": {"transformers": 1.0}}}
    where = {
        "measured": "a day",
        "machine": {"processor": "P", "cores": "2", "threads": "2", "python": "3", "torch": "T"},
    }
    return {
        "models": {"embedded": model, XL: model},
        "lines": {"baukit": 16},
        "profile": profile,
        **where,
    }


def test_table_and_bars_of_costs():
    """The table has the ratios that were stored, and what was asked for is compared with them."""
    table = cost_table(made_up(1.5), XL)
    assert (
        table.loc["baukit", "forward"] == 1.5
        and table.loc["baukit", "lines"] == 16
        and table.loc["baukit", "memory"] == 0.01
    )
    assert (
        table.loc["repeng", "forward"] == 1.5
        and pd.isna(table.loc["repeng", "wrap"])
        and "unsteered" not in table.index
    )
    verdicts = asked(made_up(1.5)).set_index(["what", "mechanism"])[""]
    assert (
        verdicts["forward", "baukit"] == "does not hold" and verdicts["memory", "baukit"] == "holds"
    )
    assert (
        verdicts["memory", "transformer_lens"] == "does not hold"
        and verdicts["memory", "nnsight"] == "not measured"
    )
    assert asked(made_up(1.01)).set_index(["what", "mechanism"])[""]["forward", "baukit"] == "holds"


def test_figures_of_costs():
    """The pictures have a bar for each mechanism and peer, with its figure."""
    figure = plot_cost(made_up(1.5))
    assert len(figure.axes) == 6 and {text.get_text() for text in figure.axes[0].texts} == {"1.500"}
    assert (
        figure.get_supxlabel() == provenance(made_up(1.5)) == "measured a day, P, 2 cores; torch T"
    )
    assert figure.axes[0].get_title() == "forward (embedded, d_model 7)"
    axis = plot_profile(made_up(1.5)).axes[0]
    assert "2 ms" in {text.get_text() for text in axis.texts} and "d_model 7" in axis.get_xlabel()


FRAMES = [
    "<module> (/x/benchmarks/profiling.py:9)",
    "passes (/x/benchmarks/profiling.py:5)",
    "Block.forward (/x/site-packages/transformers/gpt2.py:7)",
]


@pytest.mark.parametrize(
    ("inner", "owner"),
    [
        ([], ("transformers", "Block.forward")),
        (
            ["Module.__call__ (/x/site-packages/torch/nn/module.py:7)"],
            ("torch, Python", "Module.__call__"),
        ),
        (
            ["at::addmm (/x/site-packages/torch/lib/libtorch_cpu.so)", "kernel (gemm.cpp:12)"],
            (KERNELS, "Block.forward"),
        ),
        (["add_vector (<baukit.ipynb, mechanism cell 2, 00aa>:5)"], (OWN, "add_vector")),
        (["has_hook (/x/site-packages/accelerate/utils.py:5)"], (OTHER, "has_hook")),
        (
            ["Envoy.__call__ (/x/site-packages/nnsight/a.py:5)", "dict_get (libpython3.11.so)"],
            ("nnsight", "Envoy.__call__"),
        ),
    ],
)
def test_a_sample_belongs_to_whose_code_runs(inner, owner):
    """It belongs to the innermost Python frame, unless that one called into torch's C++."""
    assert owner_of([*FRAMES, *inner]) == owner
    assert owner_of([FRAMES[0], *inner]) is None


def test_shares_of_samples():
    """Samples are counted, and functions named with their own share."""
    found = shares(
        [
            ";".join(FRAMES) + " 3",
            ";".join([*FRAMES, "at::mm (libtorch_cpu.so)"]) + " 1",
            "start (/x/main.py:1) 9",
        ]
    )
    assert found["samples"] == 4 and found["packages"] == {KERNELS: 0.25, "transformers": 0.75}
    assert found["functions"] == {"transformers": {"Block.forward": 0.75}}
