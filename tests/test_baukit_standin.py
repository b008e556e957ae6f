"""The laws of `Trace` and `TraceDict`: of the stand-in, and of the real baukit where it is installed."""

import pytest
import torch
from torch import Tensor, nn

from common import baukit_standin


@pytest.fixture(params=["stand-in", "baukit"])
def nethook(request):
    """The module that holds `Trace`, `TraceDict` and `StopForward`."""
    if request.param == "stand-in":
        return baukit_standin
    return pytest.importorskip("baukit.nethook", reason="baukit is not installed", exc_type=ImportError)


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
    """An exception of the block passes through, also when stopping is asked for, and no hook stays."""
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
    with nethook.Trace(net, "2", retain_output=False, edit_output=lambda output: output + 1) as trace:
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


def test_stand_in_may_stop_where_nothing_ran(net):
    """The stand-in allows a block in which the layer never ran; the real one raises TypeError there."""
    with baukit_standin.Trace(net, "1", stop=True) as trace:
        pass
    with baukit_standin.TraceDict(net, ["1"], stop=True):
        pass
    assert trace.output is None and hook_count(net) == 0
