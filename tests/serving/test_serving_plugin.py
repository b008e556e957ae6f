"""What the plugin changes in vLLM, on stand-ins for the classes that it wraps."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from common.serving import vllm_plugin
from common.serving.bodies import PlaceCheck
from common.serving.requests import CHECKED, Steering, steering_args
from common.serving.vllm_plugin import EXTENSION, SCHEDULER, register
from common.vectors.steering_vector import SteeringVector

LAYERS, D_MODEL = 4, 8


class Refused(Exception):
    """vLLM's error for requests that are wrong: status 400."""


def module(monkeypatch, name: str, **contents: Any) -> None:
    made = ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def vllm(monkeypatch) -> SimpleNamespace:
    """The classes of vLLM that are wrapped, not wrapped yet."""

    class EngineArgs:
        def __init__(self, steering: Any = None, **options: Any):
            self.additional_config = {} if steering is None else {"steering": steering}
            self.scheduler_cls, self.worker_extension_cls = None, ""
            self.enforce_eager = True
            vars(self).update(options)

        def create_engine_config(self, usage: str = "", headless: bool = False) -> Any:
            """Make a configuration."""
            one = {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")}
            return SimpleNamespace(
                given=(usage, headless),
                scheduler_cls=self.scheduler_cls,
                worker_extension_cls=self.worker_extension_cls,
                additional_config=self.additional_config,
                use_v2_model_runner=False,
                speculative_config=None,
                kv_transfer_config=None,
                scheduler_config=SimpleNamespace(async_scheduling=False),
                parallel_config=SimpleNamespace(**one),
                model_config=SimpleNamespace(
                    enforce_eager=self.enforce_eager,
                    runner_type="generate",
                    architectures=["GPT2LMHeadModel"],
                    dtype=torch.float16,
                    hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=D_MODEL),
                ),
            )

    class InputProcessor:
        def __init__(self, vllm_config: Any, *, registry: str = "none"):
            self.vllm_config, self.registry = vllm_config, registry

        def process_inputs(self, name: str, request: Any, *, priority: int = 0) -> Any:
            request.name, request.priority = name, priority
            return request

    class WorkerWrapperBase:
        def __init__(self, vllm_config: Any):
            self.vllm_config, self.did = vllm_config, []
            self.worker = SimpleNamespace(install_steering=lambda: self.did.append("install"))

        def init_device(self) -> None:
            self.did.append("device")

    class CompletionRequest(SimpleNamespace):
        def to_sampling_params(self, length: int, defaults: Any = None) -> Any:
            return "sampling", length, defaults

        def to_beam_search_params(self, length: int, defaults: Any = None) -> Any:
            return "search", length, defaults

    class ResponsesRequest(SimpleNamespace):
        def to_sampling_params(self, length: int) -> Any:
            return "responses", length

    openai = "vllm.entrypoints.openai"
    made = SimpleNamespace(**{name: one for name, one in locals().items() if name[0].isupper()})
    package = {"__version_tuple__": (0, 30, 0), "__version__": "0.30.0"}
    module(monkeypatch, "vllm", **package)
    module(monkeypatch, "vllm.exceptions", VLLMValidationError=Refused)
    module(monkeypatch, "vllm.engine.arg_utils", EngineArgs=EngineArgs)
    module(monkeypatch, "vllm.v1.engine.input_processor", InputProcessor=InputProcessor)
    module(monkeypatch, "vllm.v1.worker.worker_base", WorkerWrapperBase=WorkerWrapperBase)
    module(monkeypatch, f"{openai}.completion.protocol", CompletionRequest=CompletionRequest)
    module(monkeypatch, f"{openai}.responses.protocol", ResponsesRequest=ResponsesRequest)
    # A process without a server has not imported the protocols: this one was not.
    monkeypatch.delitem(sys.modules, f"{openai}.chat_completion.protocol", raising=False)
    register()
    return made


@pytest.fixture(scope="module")
def steering(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("served") / "love.safetensors"
    SteeringVector({2: torch.ones(D_MODEL), 3: torch.ones(D_MODEL)}).save(path)
    return {"vectors": {"love": str(path)}, "max_coeff": 20}


# --- the start ---


def test_an_engine_that_steers_gets_its_scheduler_and_its_worker(vllm, steering):
    """Naming ours oneself is no mistake."""
    for given in ({}, {"scheduler_cls": SCHEDULER, "worker_extension_cls": EXTENSION}):
        config = vllm.EngineArgs(steering, **given).create_engine_config("usage", headless=True)
        assert (config.scheduler_cls, config.worker_extension_cls) == (SCHEDULER, EXTENSION)
        assert config.given == ("usage", True)
    assert SCHEDULER == "common.serving.vllm_scheduler.SteeringScheduler"
    assert EXTENSION == "common.serving.vllm_worker.SteeringExtension"


def test_an_engine_without_steering_stays_as_it_is(vllm, monkeypatch):
    """In any version, with any scheduler and worker, compiled or not."""
    monkeypatch.setattr("vllm.__version_tuple__", (0, 99, 0))
    options = {"scheduler_cls": "a.B", "worker_extension_cls": "a.C", "enforce_eager": False}
    config = vllm.EngineArgs(**options).create_engine_config(headless=True)
    assert (config.scheduler_cls, config.worker_extension_cls) == ("a.B", "a.C")
    assert config.given == ("", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler_cls": "a.B"}, "brings its own scheduler_cls, got 'a.B'"),
        ({"worker_extension_cls": "a.B"}, "brings its own worker_extension_cls, got 'a.B'"),
        ({"enforce_eager": False}, "steering needs eager mode"),
    ],
)
def test_an_engine_that_cannot_steer_does_not_start(vllm, steering, options, message):
    with pytest.raises(ValueError, match=message):
        vllm.EngineArgs(steering, **options).create_engine_config()


def test_what_the_engine_is_to_steer_with_is_read_at_its_start(vllm, steering):
    """By the model: a layer that it does not have, and numbers of the dtype in which it runs."""
    with pytest.raises(ValueError, match="expected at least one file"):
        vllm.EngineArgs({}).create_engine_config()
    config = vllm.EngineArgs(steering).create_engine_config()
    menu, served = vllm_plugin.offers_of(config)
    assert menu.largest == 65504 and menu.offers["love"].layers == (2, 3)
    assert served["love"].rows[2].shape == (1, D_MODEL)
    config.model_config.hf_text_config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="steers layer 3, and the model has layers 0 to 2"):
        vllm_plugin.offers_of(config)
    config.model_config.hf_text_config.hidden_size = 9
    with pytest.raises(ValueError, match="d_model is 9"):
        vllm_plugin.offers_of(config)


@pytest.mark.parametrize("version", [(0, 29, 9), (0, 31, 0), (1, 30, 0), (0, 31, "rc1")])
def test_other_versions_of_vllm_are_refused(vllm, steering, monkeypatch, version):
    monkeypatch.setattr("vllm.__version_tuple__", version)
    monkeypatch.setattr("vllm.__version__", "0.99")
    with pytest.raises(ValueError, match=r"vLLM 0\.30 \(before 0\.31\), and this is 0\.99"):
        vllm.EngineArgs(steering).create_engine_config()


@pytest.mark.parametrize("version", [(0, 30, 0), (0, 30, 2), (0, 30, "0rc1", "cpu")])
def test_these_versions_steer(vllm, steering, monkeypatch, version):
    monkeypatch.setattr("vllm.__version_tuple__", version)
    assert vllm.EngineArgs(steering).create_engine_config().scheduler_cls == SCHEDULER


def test_in_another_version_nothing_but_the_start_is_changed(monkeypatch):
    """Its other parts may be elsewhere."""

    class EngineArgs:
        def create_engine_config(self) -> None: ...

    before = EngineArgs.create_engine_config
    module(monkeypatch, "vllm", __version_tuple__=(0, 31, 0))
    module(monkeypatch, "vllm.engine.arg_utils", EngineArgs=EngineArgs)
    for name in ("vllm.v1.engine.input_processor", "vllm.v1.worker.worker_base"):
        monkeypatch.setitem(sys.modules, name, None)
    register()
    assert EngineArgs.create_engine_config is not before


def test_a_second_call_changes_nothing(vllm):
    """Methods keep their names and what is written of them."""
    before = [vllm.EngineArgs.create_engine_config, vllm.InputProcessor.process_inputs]
    register()
    assert before == [vllm.EngineArgs.create_engine_config, vllm.InputProcessor.process_inputs]
    assert before[0].__name__ == "create_engine_config"
    assert before[0].__doc__ == "Make a configuration."


def test_a_worker_steers_when_its_device_is_there(vllm, steering):
    """Of an engine without steering it does not."""
    for given, did in ((steering, ["device", "install"]), (None, ["device"])):
        wrapper = vllm.WorkerWrapperBase(vllm.EngineArgs(given).create_engine_config())
        wrapper.init_device()
        assert wrapper.did == did


# --- requests ---


@pytest.fixture
def processor(vllm, steering) -> Any:
    config = vllm.EngineArgs(steering).create_engine_config()
    processor = vllm.InputProcessor(config, registry="some")
    assert processor.registry == "some"
    return processor


def request(extra_args: Any, **changes: Any) -> SimpleNamespace:
    """A request for the engine, with a prompt of five tokens."""
    entries = {
        "sampling_params": SimpleNamespace(extra_args=extra_args),
        "prompt_token_ids": [5, 6, 7, 8, 9],
        "prompt_embeds": None,
        "cache_salt": None,
        "resumable": False,
    }
    return SimpleNamespace(**{**entries, **changes})


def test_a_request_carries_what_was_checked_and_a_salt(processor):
    args = {**steering_args("love", 2, [3], -2), "session": "x"}
    given = dict(args)
    found = processor.process_inputs("r", request(given), priority=3)
    assert (found.name, found.priority) == ("r", 3)
    asked = Steering("love", 2.0, (3,), start=3)
    assert found.sampling_params.extra_args == {"session": "x", CHECKED: asked.to_wire()}
    json.dumps(found.sampling_params.extra_args)
    assert given == args, "the caller's own mapping was changed"
    digest = processor.steering[1]["love"].offer.digest
    assert found.cache_salt == asked.salt(digest)
    for salt in ("mine", "steering-mine"):
        salted = processor.process_inputs("r", request(given, cache_salt=salt))
        assert salted.cache_salt == asked.salt(digest, salt)


def test_no_unsteered_request_brings_the_salt_of_a_steering(processor):
    """With it unsteered keys and values would be taken for steered ones, and the other way."""
    salt = processor.process_inputs("r", request(steering_args("love"))).cache_salt
    with pytest.raises(Refused, match="begins with 'steering-', as ours"):
        processor.process_inputs("r", request({}, cache_salt=salt))


@pytest.mark.parametrize("extra_args", [None, {}, {"session": "x"}])
def test_a_request_that_asks_for_nothing_stays_as_it_is(processor, extra_args):
    """Also one that is streamed in parts, and one that has a salt."""
    given = request(extra_args, cache_salt="mine", resumable=True)
    found = processor.process_inputs("r", given)
    assert found.sampling_params.extra_args is extra_args and found.cache_salt == "mine"


def test_a_request_for_no_text_stays_as_it_is(processor):
    """Such as one for embeddings."""
    given = request(None, sampling_params=None)
    assert processor.process_inputs("r", given) is given and given.cache_salt is None


def test_a_prompt_may_come_as_embeddings(processor):
    given = request(
        steering_args("love", min_token_index=-1),
        prompt_token_ids=None,
        prompt_embeds=torch.zeros(7, D_MODEL),
    )
    found = processor.process_inputs("r", given)
    assert found.sampling_params.extra_args[CHECKED]["start"] == 6


@pytest.mark.parametrize(
    ("extra_args", "changes", "message"),
    [
        ({"steering": "none"}, {}, "unknown steering vector 'none'"),
        (steering_args("love", 21), {}, "between -20 and 20"),
        ({CHECKED: {}}, {}, f"unknown argument '{CHECKED}'"),
        (steering_args("love"), {"resumable": True}, "streamed in parts cannot be steered"),
    ],
)
def test_a_request_that_is_wrong_is_refused_as_one_of_a_client(
    processor, extra_args, changes, message
):
    given = request(extra_args, **changes)
    with pytest.raises(Refused, match=message):
        processor.process_inputs("r", given)
    assert given.cache_salt is None


def test_an_engine_without_steering_refuses_who_asks(vllm):
    processor = vllm.InputProcessor(vllm.EngineArgs().create_engine_config())
    assert processor.process_inputs("r", request(None)).cache_salt is None
    with pytest.raises(Refused, match="started without steering vectors"):
        processor.process_inputs("r", request(steering_args("love")))


# --- what a server is sent ---


def sent(kind: type, **entries: Any) -> Any:
    """A request over HTTP; `model_extra` holds the fields that the server does not know."""
    return kind(**{"vllm_xargs": None, "model_extra": None, **entries})


def test_arguments_beside_vllm_xargs_are_refused(processor, vllm):
    for kind in (vllm.CompletionRequest, vllm.ResponsesRequest):
        for name in ("steering", "steering_coeff"):
            with pytest.raises(Refused, match=f"expected '{name}' inside vllm_xargs"):
                sent(kind, model_extra={"other": 1, name: 2}).to_sampling_params(5)
        assert sent(kind, model_extra={"other": 1}).to_sampling_params(5)[1] == 5
    inside = sent(vllm.CompletionRequest, vllm_xargs=steering_args("love"))
    assert inside.to_sampling_params(5, defaults="these") == ("sampling", 5, "these")


def test_arguments_that_came_with_the_wrong_mapping_are_refused(processor, vllm):
    """A raw body has no extra_body: that is the OpenAI client's word for what it adds."""
    given = {"extra_body": {"vllm_xargs": steering_args("love")}}
    with pytest.raises(Refused, match="inside vllm_xargs of a completion, not inside extra_body"):
        sent(vllm.CompletionRequest, model_extra=given).to_sampling_params(5)


def test_a_server_reads_bodies_of_every_kind(monkeypatch, vllm, steering):
    """Once, however many front ends a process makes; some kinds drop what they do not know."""

    class App(list):
        add_middleware = list.append

    name, app = "vllm.entrypoints.launchers.app", App()
    more = {"init_entrypoints_middleware": lambda args, app, tasks: app.extend([args, tasks])}
    module(monkeypatch, name, **more)
    for _ in range(2):
        vllm.InputProcessor(vllm.EngineArgs(steering).create_engine_config())
    sys.modules[name].init_entrypoints_middleware("args", app, "all")
    assert app == ["args", "all", PlaceCheck]


@pytest.mark.parametrize("place", ["vllm_xargs", "model_extra"])
def test_a_beam_search_that_asks_for_steering_is_refused(processor, vllm, place):
    asked = sent(vllm.CompletionRequest, **{place: {"other": 1, "steering_coeff": 2}})
    with pytest.raises(Refused, match="beam search drops what a request brings"):
        asked.to_beam_search_params(5)
    plain = sent(vllm.CompletionRequest, **{place: {"other": 1}})
    assert plain.to_beam_search_params(5, defaults="these") == ("search", 5, "these")


def test_the_third_kind_of_request_is_watched_too(monkeypatch, vllm, steering):
    """Of each kind that the server has imported when its front end begins."""

    class ChatCompletionRequest(vllm.CompletionRequest):
        def to_sampling_params(self, length: int) -> str:
            return "chat"

    name = "vllm.entrypoints.openai.chat_completion.protocol"
    module(monkeypatch, name, ChatCompletionRequest=ChatCompletionRequest)
    vllm.InputProcessor(vllm.EngineArgs(steering).create_engine_config())
    with pytest.raises(Refused, match="inside vllm_xargs"):
        sent(ChatCompletionRequest, model_extra={"steering": "love"}).to_sampling_params(5)
