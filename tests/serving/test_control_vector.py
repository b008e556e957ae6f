"""Control vectors of llama.cpp: which layers, which row, which command. No engine runs here."""

import ctypes
import shlex
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.serving.llama_cpp import control_vector, steer_llama_cpp
from common.vectors.steering_vector import SteeringVector

GPT2 = {"model_type": "gpt2", "model": "embedded"}


def vector_of(layers, d_model: int = 4, layer_type="decoder_block") -> SteeringVector:
    """Of layer 3 it is [3.0, 3.1, …]."""
    row = torch.arange(d_model) / 10
    return SteeringVector({layer: layer + row for layer in layers}, layer_type, dict(GPT2))


# --- select ---


@given(st.lists(st.integers(-3, 8), min_size=1, unique=True), st.data())
def test_selected_layers_are_those_of_the_vector(layers, data):
    """The same vectors, in the order asked for; the rest of the vector stays, and so does it."""
    vector = vector_of(layers, layer_type="mlp")
    chosen = data.draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
    selected = vector.select(np.array(chosen))
    assert list(selected.layer_activations) == chosen
    for layer, one in selected.layer_activations.items():
        assert one is vector.layer_activations[layer]
    assert isinstance(selected, SteeringVector)
    assert (selected.layer_type, selected.metadata) == ("mlp", GPT2)
    assert list(vector.layer_activations) == layers


@pytest.mark.parametrize(
    "layers, says",
    [
        ([1, 7], r"layers out of \[1, 2\], got \[1, 7\]"),
        ([], r"layers out of \[1, 2\], got \[\]"),
        ([-1], r"layers out of \[1, 2\], got \[-1\]"),
        (1, "list of layer numbers as layers, got 1"),
        ([1.0], "integer as layer number, got 1.0"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, says):
    with pytest.raises(ValueError, match=says):
        vector_of([2, 1]).select(layers)


# --- the rows ---


@given(st.sets(st.integers(1, 8), min_size=1), st.integers(0, 3), st.floats(-100, 100))
def test_a_row_is_the_layer_after_it(layers, more, multiplier):
    """Row i is layer i + 1, times the multiplier; 0 where there is none; as long as the model."""
    vector, blocks = vector_of(layers), max(layers) + 1 + more
    rows = control_vector(vector, multiplier, blocks, 4)
    assert rows.dtype == np.float32 and rows.flags.c_contiguous and rows.shape == (blocks - 1, 4)
    for row, numbers in enumerate(torch.from_numpy(rows)):
        wanted = vector.layer_activations.get(row + 1, torch.zeros(4))
        assert torch.equal(numbers, multiplier * wanted)


@pytest.mark.parametrize(
    "vector, multiplier, says",
    [
        (vector_of([0, 2]), 1.0, r"has 0: keep the others with vector.select\(\[2\]\), or add it"),
        (vector_of([0]), 1.0, "has 0: add it to a bias"),
        (vector_of([-1]), 1.0, "this one has -1: count from the first layer"),
        (vector_of([6]), 1.0, "layer 6 does not exist: the model has 6 blocks.* from 1 to 5"),
        (vector_of([1, 7]), 1.0, "layer 7 does not exist"),
        (vector_of([1], layer_type="mlp"), 1.0, "acts on 'decoder_block', this one on 'mlp'"),
        (vector_of([1], d_model=3), 1.0, "layer 1 has 3 numbers, and d_model is 4"),
        (vector_of([1]) + vector_of([2]) * 1e300, 1.0, "finite in float32.* of layer 2"),
        (vector_of([1]), 1e39, "after multiplication by 1e"),
        (vector_of([1]), float("nan"), "finite number as multiplier"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused(vector, multiplier, says):
    with pytest.raises(ValueError, match=says):
        control_vector(vector, multiplier, blocks=6, d_model=4)


def test_a_vector_that_is_being_learned_is_given_as_it_is_now():
    learned = SteeringVector({1: torch.ones(4, requires_grad=True)})
    assert np.array_equal(control_vector(learned, 2.0, blocks=3, d_model=4), [[2.0] * 4, [0.0] * 4])


@pytest.mark.parametrize(
    "vector, says",
    [
        (vector_of([0, 1, 2]), r"keep the others with vector.select\(\[1, 2\]\), or add it to a"),
        (vector_of([-1]), "count from the first layer"),
        (SteeringVector({1: torch.ones(3), 2: torch.ones(4)}), r"one width, this one has \[3, 4\]"),
        (vector_of([1]) * float("nan"), "finite in float32, got others in the vector of layer 1"),
    ],
)
def test_no_file_and_no_command_for_what_cannot_be_added(tmp_path, vector, says):
    with pytest.raises(ValueError, match=says):
        vector.save_gguf(tmp_path / "love.gguf")
    with pytest.raises(ValueError, match=says):
        vector.llama_cpp_command("love.gguf")
    assert not list(tmp_path.iterdir())


# --- the command ---


@given(
    multiplier=st.floats(-1e6, 1e6).filter(lambda number: not 0 < abs(number) < 1e-30),
    name=st.text(st.characters(exclude_characters=':,"\0', exclude_categories=["Cs"]), min_size=1),
)
def test_a_shell_reads_the_command_as_it_was_meant(multiplier, name):
    """Whatever the names; the multiplier keeps all its digits."""
    command = vector_of([1, 2]).llama_cpp_command(name, multiplier, "a model.gguf", "./llama cli")
    program, *arguments = shlex.split(command)
    assert program == "./llama cli"
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options.keys() == {"--model", "--control-vector-scaled"}
    assert options["--model"] == "a model.gguf"
    file, scale = options["--control-vector-scaled"].split(":")
    assert file == name and float(scale) == multiplier


def test_the_command_by_default():
    assert vector_of([1]).llama_cpp_command("love.gguf", 9.6) == (
        "llama-server --model model.gguf --control-vector-scaled love.gguf:9.6"
    )
    assert vector_of([1]).llama_cpp_command("love.gguf").endswith("love.gguf:1.0")


@pytest.mark.parametrize("limit", [torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max])
def test_every_multiplier_that_float32_has_is_written(limit):
    command = SteeringVector({1: torch.zeros(4)}).llama_cpp_command("love.gguf", -limit)
    assert float(shlex.split(command)[-1].removeprefix("love.gguf:")) == -limit


@pytest.mark.parametrize("name", ["C:\\love.gguf", "love,hate.gguf", '"love".gguf'])
def test_a_name_that_llama_cpp_would_split_is_refused(name):
    with pytest.raises(ValueError, match="splits its argument at"):
        vector_of([1]).llama_cpp_command(name)


@pytest.mark.parametrize(
    "multiplier, says",
    [
        (float("inf"), "finite number as multiplier"),
        (True, "finite number as multiplier"),
        ("3", "finite number as multiplier"),
        (-1e39, "in float32, which has no -1e"),
        (1e-40, "in float32, which has no 1e-40"),
        (3e38, "after multiplication by 3e"),
    ],
)
def test_a_multiplier_that_llama_cpp_cannot_read_is_refused(multiplier, says):
    with pytest.raises(ValueError, match=says):
        vector_of([1]).llama_cpp_command("love.gguf", multiplier)


# --- a running model, on a stand-in for llama-cpp-python ---


class Llama:
    """Notes what it is told; a model of six blocks, four wide."""

    def __init__(self) -> None:
        self.model, self.ctx, self.cache = SimpleNamespace(blocks=6), object(), None
        self.metadata = {"general.architecture": "gpt2"}
        self.told: list[Any] = []
        self.answer = 0

    def n_embd(self) -> int:
        return 4

    def set_cache(self, cache: Any) -> None:
        self.cache = cache

    def reset(self) -> None:
        self.told.append("forget")


@pytest.fixture
def llama(monkeypatch) -> Llama:
    llama = Llama()

    def adapt(ctx: object, pointer: Any, size: int, width: int, first: int, last: int) -> int:
        assert ctx is llama.ctx
        numbers = pointer and ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))[:size]
        llama.told.append((numbers, size, width, first, last))
        return llama.answer

    engine = ModuleType("llama_cpp")
    contents = {"Llama": Llama, "llama_model_n_layer": lambda model: model.blocks}
    vars(engine).update(contents, llama_set_adapter_cvec=adapt)
    monkeypatch.setitem(sys.modules, "llama_cpp", engine)
    return llama


def assert_told(llama: Llama, vector: SteeringVector, multiplier: float) -> None:
    """It forgot what it had read, and then got the rows of blocks 1 to 5."""
    forgot, (numbers, size, width, first, last), *llama.told = llama.told
    rows = control_vector(vector, multiplier, blocks=6, d_model=4)
    assert forgot == "forget" and np.array_equal(numbers, rows.ravel())
    assert (size, width, first, last) == (20, 4, 1, 5)


def assert_released(llama: Llama) -> None:
    forgot, (numbers, _, width, _, last), *llama.told = llama.told
    assert forgot == "forget" and numbers is None and (width, last) == (4, -1)


def test_a_running_model_is_steered_for_a_block(llama):
    """And released, also by an error; it can be steered again then."""
    vector = vector_of([2, 5])
    with steer_llama_cpp(llama, vector):
        assert_told(llama, vector, 1.0)
    assert_released(llama)
    with pytest.raises(KeyError), steer_llama_cpp(llama, vector, -2.5):
        {}["an error"]
    assert_told(llama, vector, -2.5)
    assert_released(llama)
    with steer_llama_cpp(llama, vector):
        assert_told(llama, vector, 1.0)


def test_a_running_model_that_cannot_be_steered_is_left_alone(llama):
    """A second vector, a cache of texts, another thing, a layer that is not there."""

    def refused(model: object, vector: SteeringVector, says: str) -> None:
        with pytest.raises(ValueError, match=says), steer_llama_cpp(model, vector):
            raise AssertionError("it was steered")

    refused("model.gguf", vector_of([1]), "expected a llama_cpp.Llama, got a str")
    refused(llama, vector_of([6]), "layer 6 does not exist: the model has 6 blocks")
    refused(llama, vector_of([1], d_model=3), "d_model is 4")
    llama.cache = {}
    refused(llama, vector_of([1]), "take it off by llama.set_cache")
    llama.cache = None
    llama.metadata["general.architecture"] = "plamo2"
    refused(llama, vector_of([1]), "adds no control vectors to 'plamo2'")
    llama.metadata["general.architecture"] = "gpt2"
    context, llama.ctx = llama.ctx, None
    refused(llama, vector_of([1]), "the model is closed")
    llama.ctx = context
    assert not llama.told
    with steer_llama_cpp(llama, vector_of([1])):
        llama.told.clear()
        refused(llama, vector_of([2]), "steered already: add the vectors up")
        assert not llama.told
        other = Llama()
        other.ctx = llama.ctx
        with steer_llama_cpp(other, vector_of([2])):
            llama.told.clear()


def test_a_cache_of_steered_texts_ends_with_the_block(llama):
    with steer_llama_cpp(llama, vector_of([1])):
        llama.set_cache({"I": "love"})
    assert llama.cache is None


def test_a_model_that_is_closed_meanwhile_is_left_alone(llama):
    """llama.cpp would end the process."""
    with steer_llama_cpp(llama, vector_of([1])):
        llama.told.clear()
        llama.ctx = None
    assert not llama.told


def test_a_vector_that_llama_cpp_refuses_is_an_error(llama):
    """Afterwards the model is not said to be steered."""
    llama.answer = -1
    with pytest.raises(RuntimeError, match="refused"), steer_llama_cpp(llama, vector_of([1])):
        raise AssertionError("it was steered")
    llama.answer = 0
    with steer_llama_cpp(llama, vector_of([1])):
        pass
