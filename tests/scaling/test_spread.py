"""A model that accelerate spreads over devices, memory and disk, block by block.

There is one device here: blocks wait in memory and on the disk, as they do beside a full GPU.
"""

import accelerate
import pytest
import torch
import transformers
from architectures import D_MODEL, LAYERS, tiny_model

from common import SteeringVector, load_model, logits
from common.identity import identity_of_model
from repository.mechanisms import MECHANISMS, load_mechanism

VECTOR = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["I think dogs are", "My neighbour"], return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def whole(tokenizer):
    return tiny_model("Llama", len(tokenizer))


@pytest.fixture(scope="module")
def spread(tokenizer, tmp_path_factory):
    places = {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(LAYERS)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(
        tiny_model("Llama", len(tokenizer)),
        {**places, "lm_head": "cpu"},
        main_device="cpu",
        offload_dir=tmp_path_factory.mktemp("disk"),
        force_hooks=True,
    )


@pytest.mark.parametrize("layer", [0, 1], ids=["in memory", "on the disk"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_each_mechanism_steers_a_model_that_is_spread(
    tokenizer, inputs, whole, spread, name, layer
):
    """As it steers one that is not; a bias that is on the disk cannot be exchanged."""
    mechanism = load_mechanism(name)

    def run(model):
        wrapped = mechanism.wrap(model, tokenizer)
        read = mechanism.read(wrapped, inputs, layer)
        with mechanism.steer(wrapped, layer, VECTOR):
            found = mechanism.logits(wrapped, inputs)
            ids = mechanism.generate(wrapped, inputs, max_new_tokens=5)
        return read, found, ids

    if name == "bias_editing" and layer == 1:
        with pytest.raises(ValueError, match="is quantised or offloaded"):
            run(spread)
        return
    for found, expected in zip(run(spread), run(whole), strict=True):
        real = inputs["attention_mask"].bool() if found.is_floating_point() else ...
        assert torch.equal(found[real], expected[real])


def test_a_model_that_is_too_large_for_memory_is_spread(
    tokenizer, inputs, whole, tmp_path, monkeypatch
):
    """On request; it is the same model, and steered alike."""
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    places = transformers.integrations.accelerate
    monkeypatch.setattr(places, "get_max_memory", lambda given=None: {"cpu": 600_000})
    monkeypatch.setattr("common.loading.free_memory", lambda device: 600_000)
    with pytest.raises(ValueError, match="are free on cpu: .*device='auto', which spreads it"):
        load_model(str(tmp_path), device="cpu")
    model = load_model(str(tmp_path), device="auto").model
    assert any(weight.is_meta for weight in model.parameters())
    assert identity_of_model(model) == identity_of_model(whole)
    vector, found = SteeringVector({1: VECTOR, 3: VECTOR}), []
    for one in (model, whole):
        with vector.apply(one):
            found.append(logits(one, inputs))
    assert torch.equal(*found)
