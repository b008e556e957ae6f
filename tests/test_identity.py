"""What rows depend on: the weights and config of a model, its tokens, the code of a metric."""

import copy
import functools
import re
import sys
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from architectures import ARCHITECTURES, tiny_model
from odd_tokenizers import KINDS
from tokenizers import normalizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.identity import (
    hash_of_tensors,
    identity_of_metric,
    identity_of_model,
    identity_of_reading,
    identity_of_tokens,
)
from common.measuring.likelihood import kl_divergence

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
]


# --- weights ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_number_of_any_weight_counts(name):
    """The first and the last of each, buffers too; with the old value it is the same again."""
    model = tiny_model(name, 99)
    before, state = identity_of_model(model), model.state_dict()
    assert identity_of_model(copy.deepcopy(model)) == before
    for weight in {tensor.data_ptr(): tensor for tensor in state.values()}.values():
        flat = weight.view(-1)
        for place in (0, -1):
            kept = flat[place].clone()
            flat[place] += 1
            found = identity_of_model(model)
            assert found["weights"] != before["weights"] and found["config"] == before["config"]
            flat[place] = kept
    assert identity_of_model(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bytes_dtypes_and_shapes_count(dtype):
    """As they are, without a way through float32; wherever they lie in memory."""
    values = torch.arange(12).reshape(3, 4).to(dtype)
    one = hash_of_tensors([values])
    assert (
        one
        == hash_of_tensors([values.clone()])
        == hash_of_tensors([values.view(torch.uint8).clone().view(dtype)])
    )
    assert (
        one == hash_of_tensors([values.T.contiguous().T]) != hash_of_tensors([values.reshape(4, 3)])
    )
    other = values.clone()
    other.view(torch.uint8).view(-1)[-1] ^= 1
    assert hash_of_tensors([other]) != one
    assert len({hash_of_tensors([torch.ones(4).to(each)]) for each in DTYPES}) == len(DTYPES)


def test_numbers_that_float32_does_not_tell_apart():
    assert hash_of_tensors([torch.tensor([1.0], dtype=torch.float64)]) != hash_of_tensors(
        [torch.tensor([1.0 + 1e-12], dtype=torch.float64)]
    )


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_saved_is_loaded(tmp_path, name):
    """Neither the folder nor saving makes another model of it."""
    model = tiny_model(name, 99)
    before = identity_of_model(model)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval() for folder in "ab"]
    assert [identity_of_model(one) for one in (model, *loaded)] == [before] * 3


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_offloaded_weights_are_read_from_where_they_lie(tmp_path, name):
    """Weights on the CPU's side or on the disk are the same model; one that changes is another."""
    model = tiny_model(name, 99)
    before = identity_of_model(model)
    offloaded = [
        cpu_offload(copy.deepcopy(model), torch.device("cpu")),
        disk_offload(copy.deepcopy(model), tmp_path / "disk", torch.device("cpu")),
    ]
    assert all(next(one.parameters()).is_meta for one in offloaded)
    assert [identity_of_model(one) for one in offloaded] == [before] * 2
    with torch.no_grad():
        next(model.parameters())[-1, -1] += 1
    assert (
        identity_of_model(cpu_offload(model, torch.device("cpu")))["weights"] != before["weights"]
    )


def test_weights_that_are_nowhere_are_refused():
    """By name."""
    model = tiny_model("GPT-2", 99)
    model.transformer.h[1].mlp.to("meta")
    with pytest.raises(ValueError, match="transformer.h.1.mlp.c_fc.weight is on no device"):
        identity_of_model(model)


def test_what_changes_the_output_without_a_weight():
    """Another activation function; another `eps` or scaling in the config."""
    model = tiny_model("Llama", 99)
    before = identity_of_model(model)
    for name, value in (
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 0.1),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ):
        other = copy.deepcopy(model)
        setattr(other.config, name, value)
        assert (
            identity_of_model(other)["config"] != before["config"]
            and identity_of_model(other)["weights"] == before["weights"]
        )
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert identity_of_model(model)["modules"] != before["modules"]


# --- tokens ---


def test_tokens_that_are_written_differently(tokenizer):
    before = identity_of_tokens(tokenizer)
    tokenizer(["a", "a b c"], padding=True)  # what it was last used for does not count
    assert identity_of_tokens(copy.deepcopy(tokenizer)) == identity_of_tokens(tokenizer) == before
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["qqq"])
    assert identity_of_tokens(other) != before


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_that_read_differently(kind):
    """Also where they write the same; saved and loaded it is the same one."""
    tokenizer = KINDS[kind]()
    before = identity_of_reading(tokenizer)
    can_pad = tokenizer.pad_token is not None
    tokenizer(["a", "a b c"], padding=can_pad, truncation=True, max_length=2)
    assert identity_of_reading(tokenizer) == before == identity_of_reading(KINDS[kind]())

    def told_apart(change):
        other = KINDS[kind]()
        change(other)
        assert identity_of_reading(other) != before

    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    told_apart(lambda other: setattr(other, "chat_template", template))
    told_apart(lambda other: other.add_tokens(["qqq"]))
    lower = normalizers.Lowercase()
    told_apart(lambda other: setattr(other.backend_tokenizer, "normalizer", lower))
    told_apart(lambda other: setattr(other, "bos_token", tokenizer.convert_ids_to_tokens(7)))
    if kind in ("Llama", "Gemma"):
        told_apart(lambda other: setattr(other, "add_bos_token", False))


def test_a_tokenizer_that_was_saved_reads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert identity_of_reading(loaded) == identity_of_reading(tokenizer)


# --- metrics ---

FACTOR = 1.0


def helper(scores):
    return FACTOR * scores


class Scaled:
    """A metric with a state."""

    power = 1

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, steered, plain):
        return self._scaled(steered**self.power)

    def _scaled(self, scores):
        return scores * self.scale


def closure(value):
    return lambda steered, plain: steered[:, value]


class Lexicon(dict):
    """A dict with a state."""

    def __init__(self, words, weight=1):
        super().__init__(words)
        self.weight = weight


class Words(set):
    """A set with a method."""

    def score(self):
        return len(self)


def failing(steered, plain):
    try:
        return helper(steered)
    except ValueError:
        return 0


def without_its_try(function):
    """The same code, which no exception leaves for its `except`."""
    return types.FunctionType(
        function.__code__.replace(co_exceptiontable=b""), function.__globals__, function.__name__
    )


def ring(through: int) -> list:
    """A list in a list, which holds itself (1) or the outer one (2)."""
    outer, inner = [], []
    outer.append(inner)
    inner.append([inner, outer][through - 1])
    return outer


def test_equal_metrics_have_one_identity():
    """Written twice, made twice, copied."""
    one, two = (
        lambda steered, plain: helper(steered).sum(-1) + tensor
        for tensor in (torch.ones(2), torch.ones(2))
    )
    assert identity_of_metric(one, "m") == identity_of_metric(two, "m")
    assert identity_of_metric(closure(3), "m") == identity_of_metric(closure(3), "m")
    assert identity_of_metric(Scaled(2), "m") == identity_of_metric(copy.deepcopy(Scaled(2)), "m")
    assert identity_of_metric(kl_divergence, "m") == identity_of_metric(kl_divergence, "m")
    for thing in (
        Lexicon({"a": 1}, 2),
        Words("ab"),
        defaultdict(int, a=1),
        OrderedDict(a=1),
        Counter("abb"),
        deque([1]),
        namedtuple("Pair", "a b")(1, 2),
    ):
        assert identity_of_metric(closure(thing), "m") == identity_of_metric(
            closure(copy.deepcopy(thing)), "m"
        )
    linear = torch.nn.Linear(2, 2)
    assert identity_of_metric(linear, "m") == identity_of_metric(copy.deepcopy(linear), "m")


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda s, p: s[:, 1], lambda s, p: s[:, 2]),
        (lambda s, p: s.sum(-1), lambda s, p: s.mean(-1)),
        (lambda s, p, k=1: s[:, k], lambda s, p, k=2: s[:, k]),
        (lambda s, p, *, k=1: s[:, k], lambda s, p, *, k=2: s[:, k]),
        (closure(1), closure(2)),
        (closure(torch.zeros(3)), closure(torch.tensor([0.0, 0.0, 1e-30]))),
        (closure([1, (2, {"a": {3}})]), closure([1, (2, {"a": {4}})])),
        (closure(True), closure(1)),
        (closure(ring(1)), closure(ring(2))),
        (failing, without_its_try(failing)),
        (closure(defaultdict(int, a=1)), closure(defaultdict(int, a=2))),
        (closure(defaultdict(lambda: 1)), closure(defaultdict(lambda: 2))),
        (closure(Lexicon({"a": 1})), closure(Lexicon({"a": 1}, weight=2))),
        (closure(Lexicon({"a": 1})), closure(Lexicon({"a": 2}))),
        (closure(Words("ab")), closure(type("Words", (set,), {"score": sum})("ab"))),
        (closure(namedtuple("Pair", "a b")(1, 2)), closure(namedtuple("Pair", "b a")(1, 2))),
        (closure(deque([1])), closure(deque([2]))),
        (closure(type("Own", (Lexicon,), {})), closure(type("Own", (Words,), {}))),
        (closure(re.compile("love")), closure(re.compile("love", re.IGNORECASE))),
        (lambda s, p: [+row for row in s], lambda s, p: [-row for row in s]),
        (functools.partial(helper, 1), functools.partial(helper, 2)),
        (Scaled(1), Scaled(2)),
        (Scaled(1)._scaled, Scaled(2)._scaled),
        (closure(helper), closure(closure)),
        (closure(Scaled), closure(type("Scaled", (Scaled,), {"power": 2}))),
        (torch.exp, torch.log),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        (functools.cache(closure(1)), functools.cache(closure(2))),
    ],
)
def test_metrics_that_differ(one, other):
    """In constants, names, defaults, closures, arguments, states, methods, weights."""
    assert identity_of_metric(one, "m") != identity_of_metric(other, "m")


def test_what_a_metric_calls_belongs_to_it(monkeypatch):
    """A function of the same file, a number there, a method of its class, one that calls itself."""

    def recursive(steered, plain):
        return helper(steered) if steered.dim() == 1 else recursive(steered[0], plain)

    metrics = [
        recursive,
        lambda steered, plain: helper(steered),
        lambda steered, plain: sum(helper(row) for row in steered),
        Scaled(1),
    ]
    before = [identity_of_metric(metric, "m") for metric in metrics]
    monkeypatch.setattr(f"{__name__}.FACTOR", 2.0)
    monkeypatch.setattr(Scaled, "_scaled", lambda self, scores: scores)
    found = [identity_of_metric(metric, "m") for metric in metrics]
    assert all(one != other for one, other in zip(before, found, strict=True))
    monkeypatch.undo()
    assert [identity_of_metric(metric, "m") for metric in metrics] == before


def test_a_metric_of_a_notebook(monkeypatch):
    """Its module is `__main__`, whose file lies in an installed package: the kernel's."""
    main = types.ModuleType("__main__")
    main.__file__ = torch.__file__
    monkeypatch.setitem(sys.modules, "__main__", main)
    metrics = [lambda steered, plain: steered, lambda steered, plain: plain]
    for metric in metrics:
        metric.__module__ = metric.__name__ = metric.__qualname__ = "__main__"
    one, other = (identity_of_metric(metric, "m") for metric in metrics)
    assert one != other


def test_tokens_that_are_written_as_nothing(tokenizer):
    """Special ones count where a metric encodes by their names."""
    own = [copy.deepcopy(tokenizer) for _ in range(3)]
    for each, token in zip(own, ("<a>", "<b>", "<a>")):
        each.add_special_tokens({"additional_special_tokens": [token]})
    one, other, again = (identity_of_metric(closure(each), "m") for each in own)
    assert one == again != other


def test_a_module_that_a_metric_reads(monkeypatch, tmp_path):
    """The files of one's own modules count, those of installed packages go by their names."""
    file = tmp_path / "own_scores.py"
    file.write_text("def score(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_scores

    def metric(steered, plain):
        return own_scores.score(torch.exp(steered))

    def importing(steered, plain):
        import own_scores as scores

        return scores.score(steered)

    before = [identity_of_metric(one, "m") for one in (metric, importing)]
    file.write_text("def score(row):\n    return -row\n")
    assert all(
        identity_of_metric(one, "m") != was
        for one, was in zip((metric, importing), before, strict=True)
    )


@pytest.mark.parametrize(
    "thing",
    [threading.Lock(), (number for number in [1]), iter, open],
    ids=["lock", "generator", "builtin", "opened"],
)
def test_what_has_no_content_is_refused(thing, tmp_path):
    """By the name of the metric. Functions of Python have a name, and that will do."""
    if thing is iter:
        assert identity_of_metric(closure(thing), "m")
        return
    says = "the metric 'm' reaches .* which cannot be told from another one"
    with open(tmp_path / "file", "w") as file, pytest.raises(ValueError, match=says):
        identity_of_metric(closure([file if thing is open else thing]), "m")


def test_an_adapter_that_is_switched_is_another_model(model):
    """Its weights are the same; whether it acts, and how strongly, stands on its modules."""

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.scaling, self.active = layer, {"default": 2.0}, ["default"]
            self.cache = object()  # says nothing of what it computes

    steered = copy.deepcopy(model)
    first = identity_of_model(steered)
    block = steered.transformer.h[1]
    block.mlp.c_fc = Adapter(block.mlp.c_fc)
    found = [first, identity_of_model(steered)]
    block.mlp.c_fc.scaling["default"] = 3.0
    found.append(identity_of_model(steered))
    block.mlp.c_fc.active.clear()
    found.append(identity_of_model(steered))
    assert len({one["modules"] for one in found}) == 4
    block.mlp.c_fc.cache = object()
    assert identity_of_model(steered) == found[-1]
