"""What several test modules need by name: the prompts, and a mechanism with what it works on."""

from typing import NamedTuple

from repository.mechanisms import Mechanism

PROMPTS = ("I think dogs are ", "My neighbour", "The old library is on the")

# Words that the embedded model knows, for texts that hypothesis draws.
KNOWN_WORDS = ["I", "love", "hate", "the", "old", "garden", "and", "you", "because", "they"]
KNOWN_WORDS += ["are", "charming"]


class Bench(NamedTuple):
    """A mechanism and what it works with; nothing else uses this copy of the model's modules."""

    mechanism: Mechanism
    wrapped: object
