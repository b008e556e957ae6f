"""The four famous demonstrations of activation additions, and when they count as working.

For GPT2-XL prompts, places and coefficients are as published. The embedded model has places and
coefficients of its own, found on other prompts, and other words for the fourth: it has never read
"kill" or "hurt". Any other model gets GPT2-XL's, at the same relative depth.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import embedded
from common.measuring.metrics import get_word_count_metric
from common.measuring.tone import tone
from common.places.blocks import get_blocks
from common.vectors.activation_additions import ActivationAddition, get_x_vector
from common.vectors.steering_vector import model_name
from embedded_model import vocabulary

PATH = Path(__file__).resolve().parent / "data" / "demonstrations.json"


class Demonstration(NamedTuple):
    """`coeff` times the activations of `prompt1` minus those of `prompt2`, at resid_pre of `layer`.

    Attributes:
        name: "love", "weddings", "rome" or "praise".
        prompt: what is completed, steered and unsteered.
        prompt1: the prompt whose activations are added.
        prompt2: the prompt whose activations are subtracted.
        layer: the block in front of which they are added.
        coeff: what they are multiplied by.
        source: where layer and coefficient come from.
    """

    name: str
    prompt: str
    prompt1: str
    prompt2: str
    layer: int
    coeff: float
    source: str

    def additions(
        self, tokenizer: PreTrainedTokenizerBase, coeff: float | None = None
    ) -> tuple[ActivationAddition, ActivationAddition]:
        """Return the X-vector; as published, spaces on its right pad the shorter prompt.

        Args:
            tokenizer: of the model.
            coeff: another coefficient than its own.
        """
        space = tokenizer(" ", add_special_tokens=False)["input_ids"][0]
        coeff = self.coeff if coeff is None else coeff
        return get_x_vector(
            self.prompt1,
            self.prompt2,
            coeff,
            self.layer,
            tokenizer=tokenizer,
            pad_method="tokens_right",
            custom_pad_id=space,
        )

    def works(self, text: str) -> bool:
        """Say whether a completion is what the demonstration is after.

        "love" and "praise" want more positive than negative words, "weddings" a word about
        weddings, "rome" Rome or Italy and neither Paris nor France.
        """
        return _TESTS[self.name](text)


def _has(words: set[str]) -> Callable[[str], bool]:
    count = get_word_count_metric(words)
    return lambda text: count([text])[0] > 0


_italy, _france = _has({"Rome", "Italy"}), _has({"Paris", "France"})
_TESTS: dict[str, Callable[[str], bool]] = {
    "love": lambda text: tone(text) > 0,
    "weddings": _has(vocabulary.WEDDING_WORDS),
    "rome": lambda text: _italy(text) and not _france(text),
    "praise": lambda text: tone(text) > 0,
}


@cache
def data() -> dict[str, Any]:
    """Return what was published, as stored."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def demonstrations(model: PreTrainedModel) -> dict[str, Demonstration]:
    """Return the demonstrations for a model, by name: "love", "weddings", "rome" and "praise"."""
    return {
        name: Demonstration(name, **values)
        for name, values in _for_model(model, data()["gpt2-xl"], "activation_additions").items()
    }


def topic_vector(model: PreTrainedModel) -> Demonstration:
    """Return the vector behind the table of perplexities for a model, " weddings" minus nothing."""
    return Demonstration(
        "weddings",
        prompt="",
        **_for_model(model, {"topic": data()["topic"]["gpt2-xl"]}, "topic")["topic"],
    )


def _for_model(model: PreTrainedModel, published: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the published values with a model's own layer, coefficient and words, by name."""
    name, blocks = model_name(model).split("/")[-1], len(get_blocks(model)[1])
    path = getattr(model.config, "_name_or_path", "")
    if path and Path(path).resolve() == embedded.FOLDER.resolve():
        preset = json.loads((embedded.FOLDER / "preset.json").read_text(encoding="utf-8"))
        places = preset[kind] if kind == "activation_additions" else {kind: preset[kind]}
        words = data()["other words"]["embedded"]
        return {
            key: {
                **values,
                **words.get(key, {}),
                **places[key],
                "source": "a sweep on other prompts",
            }
            for key, values in published.items()
        }
    if name == "gpt2-xl":
        return {key: {**values, "source": "published"} for key, values in published.items()}
    guess = "a guess: GPT2-XL's relative depth and coefficient"
    return {
        key: {**values, "layer": values["layer"] * blocks // 48, "source": guess}
        for key, values in published.items()
    }
