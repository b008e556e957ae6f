"""What several test modules need by name: the prompts, and a mechanism with what it works on."""

from typing import NamedTuple

from repository.mechanisms import Mechanism

PROMPTS = ("I think dogs are ", "My neighbour", "The old library is on the")


class Bench(NamedTuple):
    """A mechanism and what it works with; nothing else uses this copy of the model's modules."""

    mechanism: Mechanism
    wrapped: object
