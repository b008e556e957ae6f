"""What the tests share: the embedded model, the six mechanisms on it, and some dimensions."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from support import PROMPTS, Bench
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.checking.pristine import assert_pristine, snapshot
from common.loading import copy_sharing_weights, load_model
from repository.mechanisms import MECHANISMS, load_mechanism

SIGNS = {"+": 1.0, "-": -1.0, "0": 0.0}

settings.register_profile("steering", max_examples=15, deadline=None, derandomize=True)
settings.load_profile("steering")


@pytest.fixture(scope="session")
def loaded() -> Iterator[tuple]:
    """The embedded model on the CPU; at the very end it must be as it was."""
    loaded = load_model("embedded", device="cpu")
    before = snapshot(loaded.model)
    yield loaded
    assert_pristine(loaded.model, before)


@pytest.fixture(scope="session")
def model(loaded) -> PreTrainedModel:
    return loaded.model


@pytest.fixture(scope="session")
def tokenizer(loaded) -> PreTrainedTokenizerBase:
    return loaded.tokenizer


@pytest.fixture(scope="session", params=MECHANISMS)
def bench(request, model, tokenizer) -> Bench:
    """Each of the six mechanisms, from its notebook."""
    mechanism = load_mechanism(request.param)
    return Bench(mechanism, mechanism.wrap(copy_sharing_weights(model), tokenizer))


@pytest.fixture(scope="session")
def hooks(model, tokenizer) -> Bench:
    """The reference that the other mechanisms are compared with."""
    mechanism = load_mechanism("pytorch_hooks")
    return Bench(mechanism, mechanism.wrap(copy_sharing_weights(model), tokenizer))


@pytest.fixture(scope="session")
def batch(tokenizer) -> BatchEncoding:
    """Three prompts of different lengths, padded on the left."""
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert (
        len(set(inputs["attention_mask"].sum(1).tolist())) == 3
        and inputs["attention_mask"][:, -1].all()
    )
    return inputs


@pytest.fixture(params=["first layer", "middle layer", "last layer"])
def layer(request, model) -> int:
    last = model.config.num_hidden_layers - 1
    return {"first layer": 0, "middle layer": last // 2, "last layer": last}[request.param]


@pytest.fixture(scope="session")
def plus(loaded, hooks, batch) -> Tensor:
    """A vector [d_model] as long as the hidden states it is added to, so that it changes the text.

    Its direction is random: no mechanism may care which.
    """
    hidden = hooks.mechanism.read(hooks.wrapped, batch, loaded.preset.layer)[
        batch["attention_mask"].bool()
    ]
    noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    return noise / noise.norm() * hidden.norm(dim=-1).mean()


@pytest.fixture(params=SIGNS)
def vector(request, plus) -> Tensor:
    """The steering vector, its negative, and zero."""
    return SIGNS[request.param] * plus


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args) -> dict:
    """Let pytest-playwright start the Chromium of the system, so that none is downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium to open the pages in: apt-get install chromium")
    # It gives root no sandbox.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    return {**browser_type_launch_args, "executable_path": path, "args": options}
