"""Laws of models that are split over two processes, each of which runs this program.

`python split_laws.py FOLDER RANK`: FOLDER holds tiny models, named by architecture. Every law is
computed on the split model and on a whole one, by both processes together; `RANK.json` says of each
law what was wrong, "" if nothing was.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed
from architectures import D_MODEL, LAYERS
from transformers import AutoModelForCausalLM

import common
from common import (
    ActivationAddition,
    Grid,
    LoadError,
    Sampling,
    SteeringVector,
    ablation_operator,
    copy_sharing_weights,
    extract_activations,
    load_model,
    logistic_aggregator,
    pca_aggregator,
    record_activations,
    sweep,
    sweep_logits,
    sweep_perplexity,
    train_steering_vector,
    with_position_ids,
)
from common.checking.pristine import assert_pristine, snapshot
from common.identity import identity_of_model
from common.places.sites import LAYER_TYPES, LayerType
from common.tensor_parallel import of_the_first
from repository.mechanisms import MECHANISMS, load_mechanism

SPLIT = ("Llama", "Qwen3", "GPT-NeoX")  # Qwen3 norms each head, GPT-NeoX has biases
NO_PLAN = "no plan for .*; device='auto' spreads any model"
REFUSED = {
    "GPT-2": NO_PLAN,
    "OPT": NO_PLAN,
    "odd heads": "2 processes cannot share num_key_value_heads=1",
}
PAIRS = [("I love you", "I hate you because"), ("Love.", "Hate and misery."), ("You", "The bride")]
PROMPTS = ["I think dogs are", "My neighbour"]


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Tensors are equal but for rounding, in steps of their largest number; ids are the same."""
    if isinstance(expected, torch.Tensor):
        scale = expected.abs().max().clamp(min=1).item() if expected.is_floating_point() else 0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
        return
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = found.values(), expected.values()
    for one, other in zip(found, expected, strict=True):
        close(one, other, tolerance)


class Both:
    """A tiny model, whole and split, and two prompts."""

    def __init__(self, folder: Path, name: str):
        self.path = str(folder / name)
        self.split, self.tokenizer, _ = load_model(self.path, tensor_parallel=True)
        self.whole = load_model(self.path, device="cpu").model
        self.inputs = self.tokenizer(PROMPTS, return_tensors="pt", padding=True)
        self.vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))

    def logits(self, model):
        return common.logits(model, self.inputs)[self.inputs["attention_mask"].bool()]

    def ids(self, model):
        return common.generate(model, self.inputs, max_new_tokens=6)

    def agree(self, run: Callable) -> None:
        """What `run` computes of the split model is what it computes of the whole one."""
        before = snapshot(self.split)
        found, expected = run(self.split), run(self.whole)
        assert_pristine(self.split, before)
        if isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)
        else:
            close(found, expected)


class Models(dict):
    """Loads each model when a law asks for it, in all processes together."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __missing__(self, name: str) -> Both:
        self[name] = Both(self.folder, name)
        return self[name]


Law = Callable[[Models], None]


# --- the library ---


def unsteered(both: Both) -> None:
    both.agree(lambda model: (both.logits(model), both.ids(model)))


def steered(both: Both, layer_type: LayerType = "decoder_block", operator=None) -> None:
    """Logits change by the steering as they do unsplit, and so do greedy texts."""
    vector = SteeringVector(dict.fromkeys((0, 2, LAYERS - 1), both.vector), layer_type)

    def run(model):
        with vector.apply(model, operator=operator):
            return both.logits(model), both.ids(model)

    both.agree(run)
    with pytest.raises(AssertionError):
        close(run(both.split)[0], both.logits(both.split))


def trained(both: Both, **options) -> None:
    def run(model):
        return train_steering_vector(model, both.tokenizer, PAIRS, **options).layer_activations

    both.agree(run)


def read(both: Both) -> None:
    both.agree(lambda model: extract_activations(model, both.tokenizer, PAIRS, batch_size=2))


def parts_are_refused(both: Both) -> None:
    """Where a process sees a part only: nothing is read and nothing is steered."""
    vector = SteeringVector({1: both.vector}, "mlp")
    for part in ("mlp.gate_proj", "mlp.act_fn", "self_attn.q_proj"):
        config: dict = {"mlp": f"model.layers.{{num}}.{part}"}
        for use in (vector.apply, partial(record_activations, layer_type="mlp", layer_nums=[1])):
            with use(both.whole, layer_config=config):
                pass
            says = rf"layers\.1\.{part} gives this process a part"
            with pytest.raises(ValueError, match=says), use(both.split, layer_config=config):
                pass


def sums_are_not_refused(both: Both) -> None:
    """The layers with which such parts end give the same in every process."""
    for part in ("mlp.down_proj", "self_attn.o_proj"):
        config = {"mlp": f"model.layers.{{num}}.{part}"}

        def run(model, config=config):
            with (
                SteeringVector({1: both.vector}, "mlp").apply(model, config),
                record_activations(model, "mlp", config) as seen,
            ):
                return both.logits(model), {layer: acts[0] for layer, acts in seen.items()}

        both.agree(run)


def swept(both: Both, kind: Callable, **options) -> None:
    vector = SteeringVector({1: both.vector, 2: both.vector})
    pair = [ActivationAddition(3.0, 1, "I love"), ActivationAddition(-3.0, 1, "I hate")]
    grid = Grid({"v": vector, "w": pair}, [1, 2], [1.0, -1.0])
    both.agree(lambda model: kind(model, both.tokenizer, grid, PROMPTS, **options))


def no_file(both: Both) -> None:
    """Of a sweep that every process would write."""
    path, grid = Path(f"{both.path}.sweep"), Grid({"v": SteeringVector({1: both.vector})}, [1], [1])
    for kind in (sweep, sweep_logits, sweep_perplexity):
        with pytest.raises(ValueError, match="each of which would write to path"):
            kind(both.split, both.tokenizer, grid, PROMPTS, path=path)
    assert not path.exists()


def the_first_is_asked(both: Both) -> None:
    """And all have its answer, or its exception; where the model is whole each is asked."""
    rank = torch.distributed.get_rank()

    def broken():
        raise KeyError(rank)

    assert of_the_first(both.split, lambda: rank) == 0
    assert of_the_first(both.whole, lambda: rank) == rank
    with pytest.raises(KeyError, match="0"):
        of_the_first(both.split, broken)


def gradients(both: Both) -> None:
    """With respect to the vector, through all layers after it; by autograd's way of splitting."""

    def run(model):
        vector = both.vector.clone().requires_grad_()
        with torch.enable_grad(), SteeringVector({1: vector}).apply(model):
            loss = model(**with_position_ids(both.inputs)).logits.square().mean()
        return torch.autograd.grad(loss, vector)[0]

    both.agree(run)


def identified(both: Both) -> None:
    """A split model has the weights, modules and config of the whole one."""
    assert identity_of_model(both.split) == identity_of_model(both.whole)
    changed = copy_sharing_weights(both.split)
    head, before = changed.get_output_embeddings(), snapshot(changed)
    original, head.weight = head.weight, torch.nn.Parameter(head.weight * 2)
    parameters = snapshot(changed).parameters
    name = next(name for name in parameters if parameters[name] != before.parameters[name])
    assert parameters[name][-1] != before.parameters[name][-1]  # the hash of the bytes
    assert original is both.split.get_output_embeddings().weight
    assert identity_of_model(changed)["weights"] != identity_of_model(both.split)["weights"]


# --- the mechanisms ---


def mechanism_steers(both: Both, name: str) -> None:
    """As unsplit: what it reads, greedy texts and logits under both signs, and what it leaves."""
    mechanism, outputs = load_mechanism(name), {}
    keep = both.inputs["attention_mask"].bool()
    for kind, model in (("split", both.split), ("whole", both.whole)):
        wrapped = mechanism.wrap(model, both.tokenizer)
        before = snapshot(wrapped)
        plain = mechanism.logits(wrapped, both.inputs)[keep]
        found = [mechanism.read(wrapped, both.inputs, layer)[keep] for layer in (0, LAYERS - 1)]
        for sign in (1, -1):
            with mechanism.steer(wrapped, 1, sign * both.vector):
                found += [mechanism.logits(wrapped, both.inputs)[keep]]
                found += [mechanism.generate(wrapped, both.inputs, max_new_tokens=6)]
        if mechanism.intervene is not None:
            with mechanism.intervene(wrapped, 2, lambda hidden: 2 * hidden):
                found += [mechanism.logits(wrapped, both.inputs)[keep]]
        assert_pristine(wrapped, before)
        outputs[kind] = [plain, *found, mechanism.logits(wrapped, both.inputs)[keep]]
    close(outputs["split"], outputs["whole"])
    close(outputs["split"][0], outputs["split"][-1], 0)
    with pytest.raises(AssertionError):
        close(outputs["split"][0], outputs["split"][3])


def mechanism_refuses(both: Both, name: str) -> None:
    """Before it touches the model."""
    before = snapshot(both.split)
    with pytest.raises(ValueError, match="knows nothing of models that are split over processes"):
        load_mechanism(name).wrap(both.split, both.tokenizer)
    assert_pristine(both.split, before)


def bias_with_gradients(both: Both) -> None:
    """Autograd takes another way through split layers, which adds the bias itself."""
    steer = load_mechanism("bias_editing").steer

    def run(model):
        with torch.enable_grad(), steer(model, 1, both.vector):
            return model(**with_position_ids(both.inputs)).logits.detach()[:, -1]

    both.agree(run)


def bias_is_saved(both: Both) -> None:
    """A checkpoint that a split model saves is steered, as that of the whole one is."""
    steer = load_mechanism("bias_editing").steer
    folder = both.path + "-steered"
    with steer(both.split, 1, both.vector):
        both.split.save_pretrained(folder)
    torch.distributed.barrier()
    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    with steer(both.whole, 1, both.vector):
        close(both.logits(saved), both.logits(both.whole))


def copies_have_their_own_weights(both: Both) -> None:
    """A bias of a copy steers the copy, and only it."""
    copied = copy_sharing_weights(both.split)
    plain = both.logits(both.split)
    close(both.logits(copied), plain, 0)
    with load_mechanism("bias_editing").steer(copied, 1, both.vector):
        found = both.logits(copied)
        close(both.logits(both.split), plain, 0)
    with load_mechanism("pytorch_hooks").steer(both.whole, 1, both.vector):
        close(found, both.logits(both.whole))


# --- loading ---


def refused(models: "Models", name: str, says: str) -> None:
    """A model that cannot be split, before anything is loaded."""
    with pytest.raises(LoadError, match=says):
        load_model(str(models.folder / name), tensor_parallel=True)


def laws() -> dict[str, Law]:
    """All laws, by name, in the order in which every process checks them."""
    found: dict[str, Law] = {}

    def add(title: str, law: Callable, model: str = "Llama", **options: Any) -> None:
        found[title] = lambda models: law(models[model], **options)

    add("plain", unsteered)
    for part in LAYER_TYPES:
        add(f"steered, {part}", steered, layer_type=part)
        add(f"trained, {part}", trained, layer_type=part)
    add("steered, operator", steered, operator=ablation_operator())
    add("trained, pca", trained, aggregator=pca_aggregator())
    add("trained, logistic", trained, aggregator=logistic_aggregator())
    add("activations", read)
    add("parts", parts_are_refused)
    add("sums", sums_are_not_refused)
    add("sweep", swept, kind=sweep, per_prompt=2, sampling=Sampling(max_new_tokens=5))
    add("sweep_logits", swept, kind=sweep_logits)
    add("sweep_perplexity", swept, kind=sweep_perplexity)
    add("no file", no_file)
    add("first", the_first_is_asked)
    add("gradients", gradients)
    add("saved", bias_is_saved)
    for model in SPLIT:
        add(f"identity, {model}", identified, model)
        add(f"copies, {model}", copies_have_their_own_weights, model)
        add(f"bias with gradients, {model}", bias_with_gradients, model)
        for name in MECHANISMS if model == "Llama" else ("pytorch_hooks", "bias_editing"):
            law = mechanism_refuses if name == "transformer_lens" else mechanism_steers
            add(f"{name}, {model}", law, model, name=name)
    for model, says in REFUSED.items():
        found[f"refused, {model}"] = partial(refused, name=model, says=says)
    return found


def main(folder: Path, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    models, found = Models(folder), {}
    for name, holds in laws().items():
        try:
            holds(models)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
