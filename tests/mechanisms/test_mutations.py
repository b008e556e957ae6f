"""Would the tests notice? Each mechanism's cells are broken on purpose, and a test must fail."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import test_restoration
from laws import Steering, ids_equal, logits_equal
from support import Bench

from common.loading import copy_sharing_weights
from common.passes.hooks import EndOfPass
from repository.mechanisms import MECHANISMS, Mechanism, mechanism_cells, run_cells

# Where each mechanism adds: (the expression, the hidden states in it, the vector in it).
ADDITIONS = dict.fromkeys(MECHANISMS, ("hidden + vector", "hidden", "vector")) | {
    "bias_editing": ("original + change", "original", "change")
}
CHANGED_ADDITIONS = {
    "skipped": "{hidden} + 0 * {vector}",
    "wrong sign": "{hidden} - {vector}",
    "twice": "{hidden} + 2 * {vector}",
    "row 0 only": "{hidden} + {vector} * (torch.arange(len({hidden})) == 0).view(-1, 1, 1)",
    "last position only": (
        "{hidden} + {vector} * (torch.arange({hidden}.shape[1]) == {hidden}.shape[1] - 1).view(1,"
        " -1, 1)"
    ),
    "prompt only": "{hidden} + {vector} * ({hidden}.shape[1] > 1)",
}
A_BIAS_CANNOT = ("row 0 only", "last position only", "prompt only")

WRONG_LAYER = dict.fromkeys(
    MECHANISMS, ("return intervene(model, layer, ", "return intervene(model, layer - 1, ")
) | {
    "transformer_lens": (
        "return intervene(bridge, layer, ",
        "return intervene(bridge, layer - 1, ",
    ),
    "nnsight": ("return intervene(wrapped, layer, ", "return intervene(wrapped, layer - 1, "),
    "bias_editing": (
        "get_block(model, layer).get_submodule",
        "get_block(model, layer - 1).get_submodule",
    ),
}
# What restores the model. A bridge and Trace restore by their own context managers: these are left
# out for a plain call.
RESTORES = {
    "custom_wrapper": "finally:\n        blocks[layer] = block",
    "pytorch_hooks": "yield model\n    finally:\n        handle.remove()",
    "nnsight": "finally:\n        wrapped._edits = earlier",
    "bias_editing": "finally:\n        linear.bias = original",
}
NEVER_REMOVED = {
    name: (text, text.partition("finally:")[0] + "finally:\n        pass")
    for name, text in RESTORES.items()
} | {
    "transformer_lens": (
        "return bridge.hooks(fwd_hooks=[(name, lambda hidden, hook: change(hidden))])",
        (
            "bridge.add_hook(name, lambda hidden, hook: change(hidden))\n    return"
            " __import__('contextlib').nullcontext(bridge)"
        ),
    ),
    "baukit": (
        (
            "with Trace(model, path, edit_output=edit_output, retain_output=False):\n"
            "        yield model"
        ),
        (
            "Trace(model, block_path(model, layer), edit_output=edit_output, retain_output=False)\n"
            "    yield model"
        ),
    ),
}
ONLY_WITHOUT_ERROR = (  # in the place of `finally:`
    "except ZeroDivisionError:\n        raise\n    else:"
)


def _mutations() -> dict[tuple[str, str], tuple[str, str]]:
    """Every (mechanism, mutation), and what it replaces by what."""
    found = {
        ("nnsight", "removes the edits of others"): (
            "wrapped._edits = earlier",
            "wrapped.clear_edits()",
        ),
        ("bias_editing", "undone by subtracting"): (
            "linear.bias = original",
            "linear.bias = nn.Parameter(linear.bias.detach() - change)",
        ),
    }
    for name in MECHANISMS:
        expression, hidden, vector = ADDITIONS[name]
        for mutation, form in CHANGED_ADDITIONS.items():
            if name != "bias_editing" or mutation not in A_BIAS_CANNOT:
                found[name, mutation] = (expression, form.format(hidden=hidden, vector=vector))
        found[name, "wrong layer"] = WRONG_LAYER[name]
        if name in NEVER_REMOVED:
            found[name, "never removed"] = NEVER_REMOVED[name]
        if name in RESTORES:
            found[name, "not removed after an exception"] = (
                RESTORES[name],
                RESTORES[name].replace("finally:", ONLY_WITHOUT_ERROR),
            )
    return dict(sorted(found.items()))


MUTATIONS = _mutations()
# The check that must fail, and by which mutations; the others fail `logits_equal`.
CAUGHT_BY = {
    "prompt only": "ids_equal",
    "never removed": "test_after_the_block",
    "undone by subtracting": "test_after_the_block",
    "not removed after an exception": "test_after_an_exception_in_the_block",
    "removes the edits of others": "test_after_two_nested_blocks",
}


@pytest.fixture
def fails(model, tokenizer, hooks, batch, plus) -> Callable[[Mechanism, str], bool]:
    """Say whether a mechanism fails one of the checks, on a padded batch at a middle layer."""
    steering = Steering(batch, 2, plus)
    calls = {
        "logits_equal": lambda bench: logits_equal(bench, hooks, steering),
        "ids_equal": lambda bench: ids_equal(bench, hooks, steering, sampled=True),
        "test_after_the_block": lambda bench: test_restoration.test_after_the_block(
            bench, batch, 2, plus
        ),
        "test_after_an_exception_in_the_block": lambda bench: (
            test_restoration.test_after_an_exception_in_the_block(bench, batch, 2, plus)
        ),
        "test_after_two_nested_blocks": lambda bench: test_restoration.test_after_two_nested_blocks(
            bench, hooks, batch, plus, 1, 3
        ),
    }

    def fails(mechanism: Mechanism, test: str) -> bool:
        bench = Bench(mechanism, mechanism.wrap(copy_sharing_weights(model), tokenizer))
        try:
            with (
                test_restoration.left_as_it_was(bench, batch) if "after" in test else nullcontext()
            ):
                calls[test](bench)
        except (
            AssertionError,
            EndOfPass,
        ):  # a wrapper that reads and is left behind ends every pass
            return True
        return False

    return fails


def mutant(name: str, old: str, new: str) -> Mechanism:
    """A mechanism whose cells read `new` wherever they read `old`.

    Each gets file names of its own: nnsight keeps the code of a traced block by file name and line.
    """
    cells = mechanism_cells(name)
    assert any(old in cell for cell in cells), (
        f"{name}.ipynb no longer holds {old!r}: adapt the mutation"
    )
    namespace = run_cells([cell.replace(old, new) for cell in cells], f"{name} with {new!r}")
    return Mechanism(name, *(namespace.get(function) for function in Mechanism._fields[1:]))


@pytest.mark.parametrize(("name", "mutation"), MUTATIONS)
def test_mutation_is_noticed(fails, name, mutation):
    """A mechanism that is broken in this way fails the test that is there for it."""
    assert fails(mutant(name, *MUTATIONS[name, mutation]), CAUGHT_BY.get(mutation, "logits_equal"))


@pytest.mark.parametrize("test", ["logits_equal", *dict.fromkeys(CAUGHT_BY.values())])
@pytest.mark.parametrize("name", MECHANISMS)
def test_unbroken_mechanism_passes(fails, name, test):
    """The same tests, run in the same way, pass for the mechanism as it is."""
    assert not fails(mutant(name, "", ""), test)
