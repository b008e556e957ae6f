"""Which engines are refused, on configurations that have the entries which vLLM's have."""

import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace
from typing import Any

import pytest

from common.serving.vllm_plugin import check_engine, steering_config
from repository.mechanisms import ROOT


def config(**changes: Any) -> SimpleNamespace:
    """What `check_engine` asks of a `VllmConfig`."""
    entries = {
        "enforce_eager": True,
        "architectures": ["GPT2LMHeadModel"],
        "use_v2_model_runner": False,
        "async_scheduling": False,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "speculative_config": None,
        "kv_transfer_config": None,
        "runner_type": "generate",
    } | changes
    part = SimpleNamespace(**entries)
    return SimpleNamespace(
        **entries, model_config=part, parallel_config=part, scheduler_config=part
    )


@pytest.mark.parametrize(
    "architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"]
)
def test_what_was_tried_may_start(architecture):
    check_engine(config(architectures=[architecture]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enforce_eager": False}, "steering needs eager mode.*--enforce-eager"),
        ({"use_v2_model_runner": True}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"async_scheduling": True}, "needs async_scheduling=False"),
        ({"architectures": ["BloomForCausalLM"]}, "not tried with BloomForCausalLM"),
        ({"tensor_parallel_size": 2}, "one worker, not with {'tensor_parallel_size': 2}"),
        ({"pipeline_parallel_size": 2}, "one worker, not with {'pipeline_parallel_size': 2}"),
        ({"data_parallel_size": 2}, "one worker, not with {'data_parallel_size': 2}"),
        ({"speculative_config": object()}, "not tried together with speculative_config"),
        ({"kv_transfer_config": object()}, "not tried together with kv_transfer_config"),
        ({"runner_type": "pooling"}, "vLLM steers texts that are generated"),
    ],
)
def test_what_was_not_tried_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        check_engine(config(**change))


@pytest.mark.parametrize("given", [None, {}, {"other": 1}, object()])
def test_an_engine_that_is_started_without_steering(given):
    assert steering_config(given) is None


def test_what_the_plugin_imports_is_installed_with_it():
    """Where something is missing, vLLM logs it, starts, and answers unsteered."""
    loaded = "import sys, common.serving.vllm_plugin as p, common.serving.vllm_worker as w; "
    run = subprocess.run(
        [sys.executable, "-c", f"{loaded}print(*(name.partition('.')[0] for name in sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    asked = re.findall(r"^([\w-]+)[><=]", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    modules = {name: name.replace("-", "_") for name in asked} | {"scikit-learn": "sklearn"}
    needed = {name for name, module in modules.items() if module in set(run.stdout.split())}
    # By vLLM, or by its torch.
    brought = {"torch", "transformers", "safetensors", "tokenizers", "psutil", "jinja2"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = [re.split("[><=]", text)[0] for text in project["optional-dependencies"]["serve"]]
    assert {"pandas", "lazy_loader"} <= needed
    assert needed - brought <= set(extra)
