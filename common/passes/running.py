"""What every pass needs: the device of its inputs, its positions, evaluation mode."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.places.blocks import execution_device
from common.places.positions import with_position_ids


def input_device(model: nn.Module) -> torch.device:
    """Return the device that token ids go to.

    Where accelerate offloads the embeddings, their weight and `model.device` are on "meta";
    accelerate knows the device that they are computed on.
    """
    embeddings = cast(PreTrainedModel, model).get_input_embeddings()
    for module in (embeddings, model):
        if (device := execution_device(module)) is not None:
            return device
    devices = (weight.device for weight in embeddings.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


Steering = Callable[[], AbstractContextManager]  # makes what is open while a model runs steered

_changing = threading.Lock()
# Modules that train, and how many blocks hold them in evaluation mode.
_evaluating: dict[nn.Module, int] = {}


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode; each module gets its own mode back afterwards.

    That is when the last block that is open for the module ends, in any thread.
    """
    with _changing:
        training = [
            module for module in model.modules() if module.training or module in _evaluating
        ]
        for module in training:
            _evaluating[module] = _evaluating.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _changing:
            for module in training:
                _evaluating[module] -= 1
                if not _evaluating[module]:
                    del _evaluating[module]
                    module.training = True


def evaluating(function: Callable) -> Callable:
    """Let a function of a model run in evaluation mode, without dropout (`in_evaluation_mode`)."""

    @wraps(function)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with in_evaluation_mode(model):
            return function(model, *args, **kwargs)

    return run


def pass_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the tokenizer gave, with positions counted from the mask where there is padding.

    Without padding the model's own numbering holds: RoBERTa begins at 2.
    """
    return dict(inputs) if bool(inputs["attention_mask"].all()) else with_position_ids(inputs)
