"""The worker and the scheduler of vLLM, step by step, on stand-ins for what they are built upon.

The steps are those that were recorded of an engine, see `test_serving_counts`. The engine itself
is in `test_vllm`.
"""

import copy
import enum
import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_serving_counts import STEERINGS, STEPS, output_of
from torch import Tensor, nn
from transformers import GPT2Config

from common.serving.requests import CHECKED
from common.serving.vllm_worker import RunnerSteering, SteeringExtension
from common.vectors.files import write_additions
from common.vectors.steering_vector import SteeringVector

LAYERS, D_MODEL = 6, 4
REQUESTS = sorted({request for step in STEPS for request in step["rows"]})


def carried(request: str) -> SimpleNamespace:
    """The sampling parameters of a request; without steering they have nothing of their own."""
    if request not in STEERINGS:
        return SimpleNamespace(extra_args=None)
    return SimpleNamespace(extra_args={"other": 1, CHECKED: STEERINGS[request].to_wire()})


# --- the worker ---


class Block(nn.Module):
    """Gives back what it reads, and notes it."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.read = hidden
        return hidden.clone()


class Model(nn.Module):
    """A stream of rows [rows, d_model] that begins at 0: it holds the sum of what was added."""

    def __init__(self):
        super().__init__()
        self.config = GPT2Config(n_layer=LAYERS, n_embd=D_MODEL)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, rows: int) -> list[Tensor]:
        """Return the stream after each block."""
        hidden = torch.zeros(rows, D_MODEL)
        stream = []
        for block in self.h:
            hidden = block(hidden)
            stream.append(hidden)
        return stream


class Runner:
    """What the model runner of vLLM has, and the order in which it calls it.

    As in vLLM, the batch has more places than requests.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.requests = {
            request: SimpleNamespace(sampling_params=carried(request)) for request in REQUESTS
        }
        self.input_batch: Any = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        self.loaded = args, kwargs
        self.model = Model()

    def get_model(self) -> Model:
        return self.model

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        return f"{scheduler_output.total_num_scheduled_tokens} rows"

    def _model_forward(self, rows: int, padding: int = 0) -> list[Tensor]:
        return self.model(rows + padding)

    def sample_tokens(self, grammar: Any) -> SimpleNamespace:
        return SimpleNamespace(grammar=grammar)

    def step(self, step: dict, **options: int) -> tuple[list[Tensor], SimpleNamespace]:
        """Return the stream after each block, and what goes to the scheduler."""
        rows, total = step["rows"], sum(step["lengths"])
        self.input_batch = SimpleNamespace(
            req_ids=[*rows, "a place that is empty"],
            num_reqs=len(rows),
            num_computed_tokens_cpu=np.array([*step["positions"], 999]),
        )
        output = SimpleNamespace(total_num_scheduled_tokens=total)
        assert self._prepare_inputs(output, np.array(step["lengths"])) == f"{total} rows"
        stream = self._model_forward(total, **options)
        sampled = self.sample_tokens("grammar")
        assert sampled.grammar == "grammar"
        return stream, sampled


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SimpleNamespace:
    """Of an engine that was started with what the recorded requests ask for."""
    folder = tmp_path_factory.mktemp("served")
    generator = torch.Generator().manual_seed(0)
    for name, layers in {"one": [1], "two": [0, 5], "all": range(LAYERS)}.items():
        rows = {layer: torch.randn(D_MODEL, generator=generator) for layer in layers}
        SteeringVector(rows).save(folder / f"{name}.safetensors")
    write_additions(folder / "front.safetensors", {1: torch.randn(3, D_MODEL, generator=generator)})
    paths = {name: f"{folder / name}.safetensors" for name in ("one", "two", "all", "front")}
    additions = {"front": paths.pop("front")}
    steering = {"vectors": paths, "additions": additions, "max_coeff": 8}
    text = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=D_MODEL)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, dtype=torch.float32),
        additional_config={"steering": steering},
    )


@pytest.fixture
def worker(config) -> SteeringExtension:
    """A worker of vLLM with the extension, its model loaded."""
    worker = SteeringExtension()
    worker.vllm_config, worker.model_runner = config, Runner()
    worker.install_steering()
    worker.model_runner.load_model("weights", dummy=True)
    return worker


def wanted(served: dict, step: dict) -> list[Tensor]:
    """The stream after each block, by a loop over tokens."""
    stream = torch.zeros(LAYERS, sum(step["lengths"]), D_MODEL)
    row = 0
    for request, length, position in zip(step["rows"], step["lengths"], step["positions"]):
        asked = STEERINGS.get(request)
        for token in range(position, position + length):
            if asked and token >= asked.start and (asked.end is None or token < asked.end):
                for layer in asked.layers:
                    rows = served[asked.name].rows[layer]
                    stream[layer:, row] += asked.coeff * rows[0 if asked.end is None else token]
            row += 1
    return list(stream)


def test_every_row_of_every_step_is_steered_as_asked(worker):
    """And counted: in the step, as the engine did, and in all."""
    runner, totals = worker.model_runner, dict.fromkeys(STEERINGS, 0)
    assert runner.loaded == (("weights",), {"dummy": True})
    for step in STEPS:
        stream, sampled = runner.step(step)
        served = runner.steering.deltas.rows.served
        torch.testing.assert_close(stream, wanted(served, step), rtol=0, atol=1e-5)
        assert sampled.steering == step["done"]
        for request, count in step["done"].items():
            totals[request] += count
    assert worker.steering_report() == {r: n for r, n in totals.items() if n}


def test_rows_beyond_the_step_stay_as_they_are(worker):
    stream, _ = worker.model_runner.step(STEPS[0], padding=3)
    assert stream[-1][:-3].any() and not torch.stack(stream)[:, -3:].any()


def test_what_the_engine_runs_for_itself_is_not_steered(worker):
    """It measures memory by the model, and by `_model_forward` without a step."""
    runner = worker.model_runner
    assert not hasattr(runner.sample_tokens("grammar"), "steering")
    runner.step(STEPS[0])
    assert not torch.stack(runner.model(5)).any()
    assert not torch.stack(runner._model_forward(5)).any()
    assert runner.sample_tokens("grammar").steering == {}
    assert not hasattr(runner.sample_tokens("grammar"), "steering")


def test_a_step_of_unsteered_requests_reports_that_nobody_was_steered(worker):
    runner = worker.model_runner
    runner.step(STEPS[0])
    # And nothing is left of a step that was prepared and not run.
    runner._model_forward, forward = lambda rows: [], runner._model_forward
    runner.step(STEPS[0])
    runner._model_forward = forward
    step = {"rows": ["0"], "lengths": [4], "positions": [0]}
    stream, sampled = runner.step(step)
    assert sampled.steering == {} and not torch.stack(stream).any()


def test_after_an_error_the_next_step_is_steered_anew(worker):
    runner = worker.model_runner
    block = runner.model.h[5]
    block.forward, forward = lambda hidden: 1 / 0, block.forward
    with pytest.raises(ZeroDivisionError):
        runner.step(STEPS[0])
    block.forward = forward
    assert not torch.stack(runner.model(5)).any()
    for step in STEPS[:2]:
        stream, sampled = runner.step(step)
        served = runner.steering.deltas.rows.served
        torch.testing.assert_close(stream, wanted(served, step), rtol=0, atol=1e-5)
        assert sampled.steering == step["done"]


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_does_not_add_once_is_counted_as_it_did(worker, times):
    """Request 4 asks for layers 1 and 5, and 14 tokens."""
    runner = worker.model_runner
    if times == 0:
        runner.model.h[5]._forward_hooks.clear()
    else:
        for hook in list(runner.model.h[5]._forward_hooks.values()):
            runner.model.h[5].register_forward_hook(hook)
    assert STEPS[0]["done"]["4"] == 28
    _, sampled = runner.step(STEPS[0])
    assert sampled.steering["4"] == 14 + 14 * times


def test_only_layers_of_what_is_served_are_hooked(config, worker):
    one = copy.deepcopy(config)
    del one.additional_config["steering"]["additions"]
    one.additional_config["steering"]["vectors"].pop("all")
    runner = Runner()
    runner.load_model()
    RunnerSteering(runner, one)
    assert [bool(block._forward_hooks) for block in runner.model.h] == [1, 1, 0, 0, 0, 1]


def test_a_request_is_read_once(worker):
    """Each of its steps looks at it."""
    runner = worker.model_runner
    runner.step(STEPS[0])
    for state in runner.requests.values():
        state.sampling_params = None
    _, sampled = runner.step(STEPS[0])
    assert sampled.steering == STEPS[0]["done"]


# --- the scheduler ---


class Status(enum.Enum):
    RUNNING, FINISHED_ERROR, FINISHED_STOPPED = range(3)


class Scheduler:
    """What vLLM's does with a request, as far as ours changes it."""

    def __init__(self, room: int, log: bool = False):
        self.made, self.requests, self.evicted = (room, log), {}, set()
        self.kv_cache_manager = SimpleNamespace(
            get_block_ids=lambda request: ([f"{request}a", f"{request}b"], [f"{request}c"]),
            evict_blocks=self.evicted.update,
        )

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict:
        texts = {}
        for name in scheduler_output.num_scheduled_tokens:
            if name in self.requests:
                request = self.requests[name]
                tokens, stopped = self._update_request_with_output(request, [7])
                texts[name] = tokens
                if stopped:
                    assert self._free_request(request, delay_free_blocks=False) == (name, False)
        return texts

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        return new_token_ids, False

    def _free_request(self, request: Any, delay_free_blocks: bool = True) -> tuple[str, bool]:
        del self.requests[request.request_id]
        return request.request_id, delay_free_blocks


def scheduler_on(monkeypatch) -> Any:
    """Ours, made of the stand-in, with all recorded requests."""
    entries = {
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.v1.core.sched.scheduler": {"Scheduler": Scheduler},
        "vllm.v1.request": {"Request": SimpleNamespace, "RequestStatus": Status},
    }
    for name, contents in entries.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "common.serving.vllm_scheduler", raising=False)
    ours = importlib.import_module("common.serving.vllm_scheduler")
    monkeypatch.delitem(sys.modules, "common.serving.vllm_scheduler")
    made = ours.SteeringScheduler(3, log=True)
    assert made.made == (3, True)
    for request in REQUESTS:
        made.add_request(request_of(request, carried(request)))
    return made


@pytest.fixture
def scheduler(monkeypatch) -> Any:
    return scheduler_on(monkeypatch)


def request_of(name: str, params: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name,
        sampling_params=params,
        status=Status.RUNNING,
        stop_reason=None,
        resumable=True,
    )


def failed(scheduler: Any, step: dict, done: Any) -> set[str]:
    """Which requests fail in a step of which the workers report this."""
    before = dict(scheduler.requests)
    scheduler.evicted.clear()
    reported = SimpleNamespace() if done is None else SimpleNamespace(steering=done)
    texts = scheduler.update_from_output(output_of(step), reported)
    assert texts.keys() == before.keys() & step["num_scheduled_tokens"].keys()
    gone = before.keys() - scheduler.requests
    for name, tokens in texts.items():
        request = before[name]
        assert tokens == ([] if name in gone else [7])
        if name in gone:
            assert request.status is Status.FINISHED_ERROR and request.resumable is False
            assert request.stop_reason.startswith("steering: ")
        else:
            assert request.status is Status.RUNNING and request.stop_reason is None
    assert scheduler.evicted == {f"{name}{block}" for name in gone for block in "abc"}
    return gone


def test_requests_that_are_steered_as_asked_go_on(scheduler):
    for step in STEPS:
        assert failed(scheduler, step, dict(step["done"])) == set()


@given(data=st.data())
def test_exactly_those_that_are_not_steered_as_asked_fail(data):
    """Too little, too much, or steered without having asked."""
    step = data.draw(st.sampled_from(STEPS))
    wrong = data.draw(st.sets(st.sampled_from(step["rows"])))
    done = dict(step["done"])
    for request in wrong:
        done[request] = done.get(request, 0) + data.draw(st.sampled_from([-1, 1, 5]))
    with pytest.MonkeyPatch.context() as patch:
        assert failed(scheduler_on(patch), step, done) == wrong


def test_workers_that_report_nothing_fail_all_that_were_to_be_steered(scheduler):
    step = STEPS[0]
    assert failed(scheduler, step, None) == {r for r, count in step["done"].items() if count}


def test_a_request_that_was_not_checked_fails(scheduler, caplog):
    """It came past the front end: its first token is its last."""
    params = SimpleNamespace(extra_args={"steering": "one"})
    scheduler.add_request(request_of("late", params))
    scheduler.add_request(request_of("pooling", None))
    scheduler.add_request(request_of("other", SimpleNamespace(extra_args={"session": "x"})))
    names = ["late", "pooling", "other"]
    step = {
        "num_scheduled_tokens": dict.fromkeys(names, 2),
        "new": dict.fromkeys(names, 0),
        "cached": {},
    }
    assert failed(scheduler, step, {}) == {"late"}
    assert "Request late fails: asks for steering, and was not checked" in caplog.text


def test_a_request_that_ended_is_forgotten(scheduler):
    """Its name may come again, unsteered; what is reported of it late is of no request."""
    step = STEPS[0]
    assert failed(scheduler, step, {**step["done"], "1": 0}) == {"1"}
    assert failed(scheduler, step, dict(step["done"])) == set()
    scheduler.add_request(request_of("1", carried("0")))
    done = {name: count for name, count in step["done"].items() if name != "1"}
    assert failed(scheduler, step, done) == set()
    scheduler._free_request(scheduler.requests["2"])
    assert scheduler.steerings.keys() == STEERINGS.keys() - {"1", "2"}
    assert not scheduler.unsteered


def test_a_wrong_count_in_a_part_of_the_prompt_is_not_forgotten(scheduler):
    """A request fails with the first token that it writes, however long ago it was wrong."""
    step = STEPS[0]
    output = output_of(step)
    Scheduler.update_from_output, whole = lambda *_: {}, Scheduler.update_from_output
    try:  # a step after which no request has a token
        scheduler.update_from_output(output, SimpleNamespace(steering={**step["done"], "4": 1}))
    finally:
        Scheduler.update_from_output = whole
    assert failed(scheduler, step, dict(step["done"])) == {"4"}
