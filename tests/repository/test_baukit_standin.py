"""The laws of `Trace` and `TraceDict`: of the stand-in, and of baukit where it is installed."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from repository import baukit_standin


@pytest.fixture(params=["stand-in", "baukit"])
def nethook(request):
    """The module that holds `Trace`, `TraceDict` and `StopForward`."""
    if request.param == "stand-in":
        return baukit_standin
    return pytest.importorskip(
        "baukit.nethook", reason="baukit is not installed", exc_type=ImportError
    )


@pytest.fixture
def net() -> nn.Module:
    """Three layers that run one after another, and a list of those that ran."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    net.ran = []
    for number, layer in enumerate(net):
        layer.register_forward_pre_hook(lambda module, args, number=number: net.ran.append(number))
    return net


X = torch.linspace(-1, 1, 8).view(2, 4)


def hook_count(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_trace_keeps_the_output(nethook, net):
    """`.output` is what the layer returned, the very object, and the result is unchanged."""
    expected = net(X)
    with nethook.Trace(net, "2") as trace:
        result = net(X)
    assert trace.output is result and torch.equal(result, expected)


def test_hook_lives_from_the_object_to_the_end_of_the_block(nethook, net):
    """The hook is there as soon as the object is, and gone after the block or after `close`."""
    trace = nethook.Trace(net, "1")
    assert hook_count(net) == 1
    with trace:
        assert hook_count(net) == 1
    assert hook_count(net) == 0
    nethook.Trace(net, "1").close()
    assert hook_count(net) == 0


@pytest.mark.parametrize("stop", [False, True])
def test_exception_passes_and_hooks_go(nethook, net, stop):
    """An exception in the block passes through, with `stop` as well, and no hook stays."""
    for kind, layers in ((nethook.Trace, "1"), (nethook.TraceDict, ["0", "1"])):
        with pytest.raises(KeyError), kind(net, layers, stop=stop):
            raise KeyError
        assert hook_count(net) == 0


def test_edit_with_one_argument(nethook, net):
    """What `edit_output` returns goes on through the net, and is what is kept."""
    with nethook.Trace(net, "0", edit_output=lambda output: output + 1) as trace:
        result = net(X)
    assert torch.equal(trace.output, net[0](X) + 1)
    assert torch.equal(result, net[2](net[1](net[0](X) + 1)))


def test_edit_with_two_arguments(nethook, net):
    """A second argument is the name of the layer."""
    seen = []

    def edit(output: Tensor, layer: str) -> Tensor:
        seen.append(layer)
        return output * 2

    with nethook.Trace(net, "2", edit_output=edit):
        result = net(X)
    with nethook.TraceDict(net, ["0", "1"], edit_output=edit):
        net(X)
    assert torch.equal(result, 2 * net(X)) and seen == ["2", "0", "1"]


def test_edit_that_returns_nothing_changes_nothing(nethook, net):
    """None leaves the output as it was: the slip that the notebook shows."""
    with nethook.Trace(net, "1", edit_output=lambda output: None):
        result = net(X)
    assert torch.equal(result, net(X))


def test_edit_of_a_tuple(nethook):
    """An output that is a tuple reaches `edit_output` whole."""
    lstm = nn.LSTM(4, 4)
    with nethook.Trace(lstm, edit_output=lambda output: (output[0] + 1, *output[1:])):
        result, _ = lstm(X)
    assert torch.equal(result, lstm(X)[0] + 1)


def test_without_retaining(nethook, net):
    """`retain_output=False` keeps no tensor, and still edits."""
    with nethook.Trace(
        net, "2", retain_output=False, edit_output=lambda output: output + 1
    ) as trace:
        result = net(X)
    assert getattr(trace, "output", None) is None and torch.equal(result, net(X) + 1)


def test_stop_ends_the_pass(nethook, net):
    """`stop=True` runs the net up to the layer, keeps its output, and the block ends quietly."""
    with nethook.Trace(net, "1", stop=True) as trace:
        net(X)
        raise AssertionError("the block goes on after the pass was stopped")
    assert net.ran == [0, 1] and torch.equal(trace.output, net[1](net[0](X)))


def test_module_itself(nethook, net):
    """Without a name the module itself is traced."""
    with nethook.Trace(net[1]) as trace:
        net(X)
    assert torch.equal(trace.output, net[1](net[0](X)))


def test_unknown_layer(nethook, net):
    """A name that the model does not have is a LookupError, and leaves no hook."""
    for wrong in ("7", "0.weight", "layers.0"):
        with pytest.raises(LookupError):
            nethook.Trace(net, wrong)
    with pytest.raises(LookupError):
        nethook.TraceDict(net, ["7", "0"])
    assert hook_count(net) == 0


def test_dict_keeps_every_layer(nethook, net):
    """One entry for each name, in the order given, each as a `Trace` of its own would be."""
    with nethook.TraceDict(net, ["1", "0", "1"]) as traces:
        result = net(X)
    assert list(traces) == ["1", "0"] and torch.equal(result, net(X))
    for name in traces:
        with nethook.Trace(net, name) as trace:
            net(X)
        assert torch.equal(traces[name].output, trace.output)


def test_dict_stops_after_the_last_listed(nethook, net):
    """`stop=True` runs the net up to the last layer of the list."""
    with nethook.TraceDict(net, ["0", "1"], stop=True) as traces:
        net(X)
    assert net.ran == [0, 1] and torch.equal(traces["1"].output, net[1](net[0](X)))


def test_dict_closes_all(nethook, net):
    """All hooks are there while the block is open, and none afterwards."""
    with nethook.TraceDict(net, ["0", "1", "2"]) as traces:
        assert hook_count(net) == 3
    assert hook_count(net) == 0
    traces = nethook.TraceDict(net, ["0", "2"], retain_output=False)
    traces.close()
    assert hook_count(net) == 0


def test_dict_is_an_ordered_dict(nethook, net):
    """It can be used as one; an entry that is taken out is closed by whoever took it."""
    with nethook.TraceDict(net, ["0", "1", "2"]) as traces:
        assert isinstance(traces, OrderedDict)
        traces.move_to_end("0")
        name, taken = traces.popitem()
        net(X)
    assert name == "0" and list(traces) == ["1", "2"] and hook_count(net) == 1
    taken.close()
    assert hook_count(net) == 0


def test_dict_of_no_layers(nethook, net):
    """No layers, no traces; no list at all is an error."""
    with nethook.TraceDict(net, []) as traces:
        net(X)
    assert len(traces) == 0 and hook_count(net) == 0
    with pytest.raises(TypeError):
        nethook.TraceDict(net, None)


def test_options_of_a_dict_by_layer(nethook, net):
    """Each option but `stop` may be a dict; a layer that it does not name goes without."""
    with nethook.TraceDict(
        net,
        ["0", "1"],
        retain_output={"0": True},
        retain_input={"1": True},
        clone={"0": True},
        detach={"0": True},
        retain_grad={"1": True},
        edit_output={"1": lambda output: output + 1},
    ) as traces:
        result = net(X)
    assert not traces["0"].output.requires_grad and not hasattr(traces["1"], "output")
    assert not hasattr(traces["0"], "input") and torch.equal(traces["1"].input, net[0](X))
    assert torch.equal(result, net[2](net[1](net[0](X)) + 1))


def test_options_by_position(nethook, net):
    """The options come in the order of baukit."""
    edit = {"edit_output": lambda output: output + 1, "stop": True}
    with nethook.Trace(net, "1", True, True, True, True, False, *edit.values()) as trace:
        net(X)
    with nethook.TraceDict(net, ["1"], True, True, True, True, False, *edit.values()) as traces:
        net(X)
    for kept in (trace, traces["1"]):
        assert torch.equal(kept.output, net[1](net[0](X)) + 1) and not kept.output.requires_grad
        assert torch.equal(kept.input, net[0](X)) and not kept.input.requires_grad


def test_the_whole_model_by_its_empty_name(nethook, net):
    """The empty name is the model itself, as in `named_modules`; in a dict, so is None."""
    with nethook.Trace(net, "") as trace, nethook.TraceDict(net, ["", None]) as traces:
        result = net(X)
    assert trace.output is result and traces[""].output is result and traces[None].output is result


def test_nested_names(nethook, net):
    """A dotted name reaches into a part of a part."""
    outer = nn.Sequential(net, nn.ReLU())
    with nethook.Trace(outer, "0.1") as trace:
        outer(X)
    assert torch.equal(trace.output, net[1](net[0](X)))


def test_close_twice(nethook, net):
    """Closing again does nothing, and neither does the end of the block afterwards."""
    for kind, layers in ((nethook.Trace, "1"), (nethook.TraceDict, ["0", "1"])):
        with kind(net, layers) as trace:
            trace.close()
            assert hook_count(net) == 0
            trace.close()
        assert hook_count(net) == 0


def test_nothing_is_kept_before_the_pass(nethook, net):
    """Neither attribute is there before the layer ran: a mistake is an error, and not None."""
    with nethook.Trace(net, "1", retain_input=True) as trace:
        assert not hasattr(trace, "output") and not hasattr(trace, "input")
        net(X)
    assert torch.equal(trace.input, net[0](X)) and trace.layer == "1"


def test_stop_where_nothing_ran(nethook, net):
    """A block in which the layer never ran ends in an error, and no hook stays."""
    for kind, layers in ((nethook.Trace, "1"), (nethook.TraceDict, ["1"])):
        with pytest.raises(TypeError), kind(net, layers, stop=True):
            pass
        assert hook_count(net) == 0


# What is kept.


class Doubles(nn.Module):
    """Takes two arguments and a keyword, and gives nested containers."""

    def forward(self, one: Tensor, two: Tensor, more: Tensor | None = None) -> dict:
        return {"sum": one + two, "parts": [one * 2, (two * 2,)]}


def test_retain_input(nethook, net):
    """The one positional argument, or a tuple of several; what is given by name is not there."""
    with nethook.Trace(net, "0", retain_input=True) as trace:
        net(X)
    assert trace.input is X
    doubles = Doubles()
    with nethook.Trace(doubles, retain_input=True) as trace:
        doubles(X, -X, more=X)
    assert isinstance(trace.input, tuple) and len(trace.input) == 2 and trace.input[0] is X


def test_clone(nethook, net):
    """A copy survives changes of the original; without `clone` the object itself is kept."""
    relu = nn.Sequential(net[0], nn.ReLU(inplace=True))
    before = net[0](X).detach()
    for clone, expected in ((True, before), (False, before.relu())):
        with torch.no_grad(), nethook.Trace(relu, "0", clone=clone) as trace:
            relu(X)
        assert torch.equal(trace.output, expected)
    with nethook.Trace(net, "0", clone=True, retain_input=True) as trace:
        net(X)
    assert torch.equal(trace.input, X) and trace.input is not X


def test_detach(nethook, net):
    """What is kept is outside the graph, with or without a copy; the pass goes on inside it."""
    for clone in (False, True):
        with nethook.Trace(net, "1", detach=True, clone=clone, retain_input=True) as trace:
            result = net(X)
        assert (
            not trace.output.requires_grad
            and not trace.input.requires_grad
            and result.requires_grad
        )
    with nethook.Trace(net, "1", retain_input=True) as trace:
        net(X)
    assert trace.output.requires_grad and trace.input.requires_grad


def test_copies_of_containers(nethook):
    """Tensors are copied in dicts, lists and tuples at any depth, and these keep their types."""
    doubles, one = Doubles(), X.clone().requires_grad_()
    with nethook.Trace(doubles) as trace:
        result = doubles(one, X)
    assert trace.output is result
    with nethook.Trace(doubles, detach=True, clone=True) as trace:
        result = doubles(one, X)
    kept, parts = trace.output["sum"], trace.output["parts"]
    assert isinstance(parts, list) and isinstance(parts[1], tuple)
    assert torch.equal(parts[0], result["parts"][0]) and torch.equal(
        parts[1][0], result["parts"][1][0]
    )
    assert kept is not result["sum"] and not kept.requires_grad and not parts[0].requires_grad


@pytest.mark.parametrize("option", ["clone", "detach", "retain_grad"])
def test_what_cannot_be_copied(nethook, option):
    """A text is kept as it is, and refused where it should be copied."""
    module = nn.Module()
    module.forward = lambda x: (x, "text")
    with nethook.Trace(module) as trace:
        module(X)
    assert trace.output[1] == "text"
    with pytest.raises(AssertionError), nethook.Trace(module, **{option: True}):
        module(X.clone())


def test_retain_grad(nethook, net):
    """`.output.grad` is the gradient of what was kept, also where the net is frozen.

    In-place operations may follow, and `detach` changes nothing.
    """
    frozen = nn.Sequential(net[0], nn.ReLU(inplace=True), net[1]).requires_grad_(False)
    weight = net[1].weight
    for detach in (False, True):
        with nethook.Trace(frozen, "0", retain_grad=True, detach=detach) as trace:
            frozen(X).sum().backward()
        kept = trace.output.detach()
        assert torch.equal(kept, net[0](X))
        torch.testing.assert_close(trace.output.grad, (kept > 0) * weight.sum(0))


def test_retain_grad_of_an_edited_output(nethook, net):
    """What is kept is what was edited, and has a gradient of its own."""
    with nethook.Trace(net, "1", retain_grad=True, edit_output=lambda output: output + 1) as trace:
        net(X).sum().backward()
    assert torch.equal(trace.output, net[1](net[0](X)) + 1)
    torch.testing.assert_close(trace.output.grad, net[2].weight.sum(0).expand(2, 4))


def test_retain_grad_is_not_of_the_input(nethook, net):
    """The input is kept as it is, and gets no gradient."""
    with nethook.Trace(net, "0", retain_input=True, retain_grad=True) as trace:
        net(X).sum().backward()
    assert trace.input is X and not X.requires_grad and trace.output.grad is not None


# How `edit_output` gets its arguments.

# Functions that note what they got, and what that is: by name first, then what is left, in order.
EDITS = {
    "output": (lambda note: lambda output: note(output), "output"),
    "another name": (lambda note: lambda x: note(x), "output"),
    "output and layer": (lambda note: lambda output, layer: note(output, layer), "output layer"),
    "layer and output": (lambda note: lambda layer, output: note(layer, output), "layer output"),
    "layer only": (lambda note: lambda layer: note(layer), "layer"),
    "inputs": (lambda note: lambda x, inputs: note(x, inputs), "output inputs"),
    "inputs first": (lambda note: lambda inputs, x: note(inputs, x), "inputs output"),
    "three other names": (lambda note: lambda a, b, c: note(a, b, c), "output layer inputs"),
    "another name before output": (lambda note: lambda x, output: note(x, output), "layer output"),
    "a default is filled as well": (
        lambda note: lambda output, scale=2: note(output, scale),
        "output layer",
    ),
    "a default for which nothing is left": (
        lambda note: lambda a, b, c, d=7: note(a, b, c, d),
        "output layer inputs 7",
    ),
    "a default in between": (
        lambda note: lambda a, b=8, c=9, output=0: note(a, b, c, output),
        "layer inputs 9 output",
    ),
    "by keyword only": (
        lambda note: lambda x, *, layer, scale=3: note(x, layer, scale),
        "output layer 3",
    ),
    "all by keyword only": (
        lambda note: lambda *, inputs, output: note(inputs, output),
        "inputs output",
    ),
    "one of them by keyword only": (
        lambda note: lambda x, *, output: note(x, output),
        "layer output",
    ),
    "other keywords get nothing": (
        lambda note: lambda output, **others: note(output, len(others)),
        "output 0",
    ),
    "by position only": (lambda note: lambda x, y, /: note(x, y), "output layer"),
    "a partial by keyword": (
        lambda note: partial(lambda output, scale: note(output, scale), scale=4),
        "output 4",
    ),
    "a partial by position": (lambda note: partial(lambda scale, x: note(scale, x), 5), "5 output"),
    "nothing": (lambda note: lambda: note(), ""),
}


@pytest.mark.parametrize("case", EDITS)
def test_edit_gets_its_arguments_by_name(nethook, net, case):
    """By name first; other names get, in order, what is left of output, layer and inputs."""
    (make, expected), found = EDITS[case], []
    with nethook.Trace(net, "1", edit_output=make(lambda *got: found.extend(got))):
        net(X)
    inputs = net[0](X)
    for name, got in zip(expected.split(), found, strict=True):
        if name == "output":
            assert torch.equal(got, net[1](inputs))
        elif name == "inputs":
            assert isinstance(got, tuple) and len(got) == 1 and torch.equal(got[0], inputs)
        else:
            assert got == ("1" if name == "layer" else int(name))


class Editor:
    def edit(self, output: Tensor) -> Tensor:
        return output

    __call__ = edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda a, b, c, d: a,
        lambda output, layer, inputs, scale: output,
        lambda output, *, scale: output,
        lambda *args: args[0],
        lambda output, *rest: output,
        Editor().edit,
        Editor(),
        partial(Editor().edit),
        nn.ReLU(),
        torch.relu,
    ],
)
def test_edit_that_cannot_be_called(nethook, net, edit):
    """Too many arguments, methods, objects and builtins are a TypeError, and no hook stays."""
    for kind, layers in ((nethook.Trace, "1"), (nethook.TraceDict, ["0", "1"])):
        with pytest.raises(TypeError), kind(net, layers, edit_output=edit):
            net(X)
        assert hook_count(net) == 0


def test_stand_in_refuses_by_a_sentence(net):
    """The stand-in names the wrong argument before the pass, and registers no hook."""
    for edit, saying in {
        (
            lambda a, b, c, scale: a
        ): "edit_output: expected a function of output, layer and inputs, got one that takes scale",
        (
            lambda *args, **named: named["output"]
        ): r"edit_output: .* takes \*args as well",  # baukit gives it all by name
        Editor().edit: "edit_output: expected a function, got a method, which baukit cannot call",
    }.items():
        with pytest.raises(TypeError, match=saying):
            baukit_standin.Trace(net, "1", edit_output=edit)
        with pytest.raises(TypeError, match=saying):
            baukit_standin.TraceDict(net, ["0", "1"], edit_output={"1": edit})
    with pytest.raises(LookupError):
        baukit_standin.TraceDict(net, ["0", "7"])  # baukit leaves the hook on "0"
    assert hook_count(net) == 0
    with (
        pytest.raises(TypeError, match="stop=True: expected the layer to run"),
        baukit_standin.Trace(net, "1", stop=True),
    ):
        pass
    net[1].register_forward_hook(lambda module, args, output: (output, "text"))
    with (
        pytest.raises(
            AssertionError, match="expected tensors in tuples, lists and dicts, got a str"
        ),
        baukit_standin.Trace(net, "1", clone=True),
    ):
        net[1](net[0](X))
