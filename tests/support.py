"""What several test modules need by name: prompts, vectors, a mechanism with what it works on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from common import SteeringVector
from common.passes.padding import encode
from common.texts.generation import generate
from repository.mechanisms import Mechanism

PROMPTS = ("I think dogs are ", "My neighbour", "The old library is on the")

# Words that the embedded model knows, for texts that hypothesis draws.
KNOWN_WORDS = ["I", "love", "hate", "the", "old", "garden", "and", "you", "because", "they"]
KNOWN_WORDS += ["are", "charming"]


NEW = 5  # tokens, unless a test asks for another number


def a_vector(
    d_model: int, layers: Iterable[int], seed: int = 1, size: float = 1.0
) -> SteeringVector:
    """Random vectors, one for each of some layers."""
    generator = torch.Generator().manual_seed(seed)
    draws = {layer: torch.randn(d_model, generator=generator) for layer in layers}
    return SteeringVector({layer: size * draw for layer, draw in draws.items()})


def texts_of(model, tokenizer, prompts, **options: Any) -> list[list[int]]:
    """The ids that a model writes after prompts, greedily unless told otherwise."""
    inputs = encode(tokenizer, prompts, None)
    options = {"max_new_tokens": NEW, "forced_eos_token_id": None, **options}
    return generate(model, inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


class Bench(NamedTuple):
    """A mechanism and what it works with; nothing else uses this copy of the model's modules."""

    mechanism: Mechanism
    wrapped: object
