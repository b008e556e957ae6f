"""Runs in the environment of the peers: times steering-vectors and repeng whenever it is told to.

It reads one JSON object a line and answers each with another one. The job "training" is timed once,
and `training_costs` takes turns with it; the job "cost" is all rounds of steering, each peer in
turn with its own unsteered model, for `mechanism_costs`.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import repeng
import steering_vectors
import torch
import transformers
from safetensors.torch import save_file
from shapes import random_gpt2, random_pairs, word_tokenizer
from timing import interleaved, seconds_of, summary

VERSIONS = {name: version(name) for name in ("steering-vectors", "repeng", "transformers", "torch")}


def train(case: dict[str, Any], model: transformers.PreTrainedModel) -> float:
    """Train a vector with steering-vectors, leave it in a file, and return the seconds."""
    pairs = random_pairs(case["pairs"], case["tokens"])
    tokenizer = word_tokenizer()
    started = time.perf_counter()
    vector = steering_vectors.train_steering_vector(
        model, tokenizer, pairs, layers=case["layers"], batch_size=case["batch_size"]
    )
    seconds = time.perf_counter() - started
    save_file(
        {str(layer): found.contiguous() for layer, found in vector.layer_activations.items()},
        case["vectors"],
    )
    return seconds


class Unsteered:
    """The model as it is."""

    def __init__(self, model: transformers.PreTrainedModel, layer: int, vector: torch.Tensor):
        self.model, self.layer, self.vector = model, layer, vector

    def wrap(self) -> None:
        """Put into the model what the library puts there."""

    def unwrap(self) -> None:
        """Take it out again."""

    def start(self) -> None:
        """Begin to steer."""

    def stop(self) -> None:
        """End it."""


class SteeringVectors(Unsteered):
    """steering-vectors: a hook, for as long as it steers."""

    def start(self) -> None:
        """Patch the model."""
        vector = steering_vectors.SteeringVector({self.layer: self.vector})
        self.handle = vector.patch_activations(self.model)

    def stop(self) -> None:
        """Remove the hook."""
        self.handle.remove()


class Repeng(Unsteered):
    """repeng: a wrapped block, whose vector is set for as long as it steers."""

    def wrap(self) -> None:
        """Wrap the block."""
        self.control = repeng.ControlModel(self.model, [self.layer])

    def unwrap(self) -> None:
        """Put the block back."""
        self.control.unwrap()

    def start(self) -> None:
        """Set the vector."""
        directions = {self.layer: self.vector.float().cpu().numpy()}
        self.control.set_control(
            repeng.ControlVector(model_type="gpt2", directions=directions), 1.0
        )

    def stop(self) -> None:
        """Set none."""
        self.control.reset()


@torch.no_grad()
def cost(case: dict[str, Any], model: transformers.PreTrainedModel) -> dict[str, dict]:
    """Time every peer against its own unsteered model, by the kinds of `workbench.TIMES`."""
    device, rounds, layer = case["device"], case["rounds"], case["layer"]
    model = model.to(device, getattr(torch, case["dtype"]))
    ids = torch.arange(10, 18, device=device)[None]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    eight = {name: tensor.repeat(8, 1) for name, tensor in one.items()}
    tokens = {
        "max_new_tokens": case["new tokens"],
        "min_new_tokens": case["new tokens"],
        "do_sample": False,
    }
    vector = torch.tensor(case["vector"], device=device, dtype=model.dtype)
    peers = {"unsteered": Unsteered, "steering-vectors": SteeringVectors, "repeng": Repeng}
    ways = {name: peer(model, layer, vector) for name, peer in peers.items()}
    works = {
        "forward": lambda: model(**one),
        "per token, batch 1": lambda: model.generate(**one, **tokens),
        "per token, batch 8": lambda: model.generate(**eight, **tokens),
    }
    scores: dict[str, torch.Tensor] = {}

    def timed(name: str, kind: str) -> float:
        way = ways[name]
        wrapping = seconds_of(way.wrap, device)
        starting = seconds_of(way.start, device)
        if kind in works:
            seconds = seconds_of(works[kind], device)
        else:  # of the unsteered model it is the pass that the others are compared with
            seconds = seconds_of(works["forward"], device) if name == "unsteered" else wrapping
        if name not in scores:
            scores[name] = model(**one).logits
        stopping = seconds_of(way.stop, device)
        way.unwrap()
        return starting + stopping if kind == "steer" and name != "unsteered" else seconds

    found: dict[str, dict] = {name: {} for name in ways}
    for kind in ("wrap", "steer", *works):
        turns = {name: lambda name=name, kind=kind: timed(name, kind) for name in ways}
        seconds = interleaved(turns, rounds, f"{case['name']}, peers, {kind}")
        if kind.startswith("per token"):
            seconds = {
                name: [value / case["new tokens"] for value in values]
                for name, values in seconds.items()
            }
        for name in ways:
            found[name][kind] = summary(seconds[name], seconds["unsteered"])
    for name in ("steering-vectors", "repeng"):
        assert not torch.allclose(scores[name], scores["unsteered"], atol=1e-2), (
            f"{name} does not steer"
        )
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.5
    torch.testing.assert_close(scores["steering-vectors"], scores["repeng"], rtol=0, atol=tolerance)
    del found["steering-vectors"]["wrap"]  # it has no wrapping
    return found


def main() -> None:
    """Answer until there is no more to answer."""
    answers, sys.stdout = (
        sys.stdout,
        sys.stderr,
    )  # what libraries print must not look like an answer
    torch.set_num_threads(int(sys.argv[1]))
    name, model = "", None
    print(json.dumps(VERSIONS), file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        if case["shape"] != name:
            name, model = case["shape"], None  # the old one goes before the new one comes
            folder = case.get("folder")
            model = (
                transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
                if folder
                else random_gpt2(name)
            )
        if case["job"] == "training":
            answer = train(case, model)
        else:
            torch.set_num_threads(case["threads"])
            answer = cost(case, model)
            name, model = (
                "",
                None,
            )  # it may have another dtype now, and the memory is wanted elsewhere
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
