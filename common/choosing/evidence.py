"""What speaks for a vector and against it, measured on prompts that nothing was chosen on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from common.choosing.card import HASH
from common.choosing.judging import interval
from common.choosing.splitting import Split
from common.choosing.trying import VECTOR, Directions, Subject, settings_of
from common.identity import hash_of_tensors, identity_of_model
from common.measuring.effects import (
    effect_by_cell,
    moves_by_prompt,
    perplexity_ratio_by_cell,
    unsteered_by_prompt,
)
from common.measuring.reliability import steerability, steerable_shares
from common.passes.prompts import Prompt, prompt_text
from common.sweeping.grid import Grid
from common.sweeping.strength import steering_kl
from common.vectors.pairs import SteeringVectorTrainingSample
from common.vectors.steering_vector import SteeringVector, model_name
from common.vectors.training import extract_activations

EXAMPLES = 4
SHARES = ("slope", "low", "high", "anti", "anti low", "anti high", "prompts")


@dataclass(frozen=True)
class Evidence:
    """What was measured of a vector and its controls, each at the setting that it chose.

    Attributes:
        subject: the model and the metric.
        split: the pairs and prompts.
        directions: the vector and its controls.
        chosen: the setting of each.
        rows: what they do to the prompts of the judgement.
        layer: the layer of the vector.
        multiplier: its multiplier.
        target_kl: at which it was tried.
    """

    subject: Subject
    split: Split
    directions: Directions
    chosen: pd.DataFrame
    rows: pd.DataFrame
    layer: int
    multiplier: float
    target_kl: float

    @classmethod
    def gather(
        cls, subject: Subject, split: Split, directions: Directions, chosen: pd.DataFrame
    ) -> "Evidence":
        """Steer the prompts of the judgement.

        Raises:
            ValueError: the vector chose nothing, because the metric has no value.
        """
        for row in chosen.to_dict("records"):
            if row["steering"] == VECTOR:
                setting = int(row["layer"]), float(row["multiplier"]), float(row["target_kl"])
                grid = directions.grid(settings_of(chosen))
                rows = subject.rows(grid, split.judging, judging=True)
                return cls(subject, split, directions, chosen, rows, *setting)
        raise ValueError("the metric has no value on these prompts, steered and unsteered")

    @cached_property
    def vector(self) -> SteeringVector:
        """The vector of the chosen layer."""
        return self.directions.vectors[VECTOR].select([self.layer])

    @cached_property
    def unsteered(self) -> np.ndarray:
        """The metric of each prompt, unsteered."""
        return unsteered_by_prompt(self.rows, "metric").to_numpy(dtype=float)

    @cached_property
    def moves(self) -> np.ndarray:
        """How far the vector moves each prompt."""
        moved = moves_by_prompt(self.rows, "metric")
        return moved["move"].to_numpy(dtype=float)[(moved["steering"] == VECTOR).to_numpy()]

    @cached_property
    def effect(self) -> tuple[float, float, float]:
        """The mean of the moves, and its interval."""
        return interval(self.moves)

    @cached_property
    def controls(self) -> dict[str, list[float]]:
        """By kind, the effect of each control; NaN where the metric has no value."""
        effects = effect_by_cell(self.rows, "metric")
        means = dict(zip(effects["steering"].tolist(), effects["effect"].tolist(), strict=True))
        found: dict[str, list[float]] = {}
        for name, kind in self.directions.kinds.items():
            if kind != VECTOR:
                found.setdefault(kind, []).append(float(means.get(name, np.nan)))
        return found

    # --- what a card says ---

    def place(self) -> dict[str, Any]:
        """Say where the vector acts, how strongly, and how far predictions move there."""
        kl = steering_kl(
            self.subject.model,
            self.subject.tokenizer,
            lambda: self.vector.apply(self.subject.model, multiplier=self.multiplier),
            self.split.judging,
            new_tokens=self.subject.budget.sampling.max_new_tokens,
            prepend_bos=self.subject.bos,
        )
        return {
            "layer": self.layer,
            "layer_type": self.vector.layer_type,
            "multiplier": self.multiplier,
            "kl": kl,
            "target_kl": self.target_kl,
        }

    def effect_in_full(self) -> dict[str, float]:
        """Return the effect with its interval, and the metric without and with steering."""
        (mean, low, high), known = self.effect, ~np.isnan(self.moves)
        plain = float(self.unsteered[known].mean()) if known.any() else np.nan
        effect = {"mean": mean, "low": low, "high": high}
        return effect | {"unsteered": plain, "steered": plain + mean, "prompts": int(known.sum())}

    def apart(self, training: Mapping[str, Any]) -> list[float]:
        """Return how the sides of the pairs that were kept back lie along the vector.

        Args:
            training: how pairs are read.
        """
        if not self.split.kept:
            return []
        reading: dict[str, Any] = {**training, "layers": [self.layer]}
        subject = self.subject
        sides = extract_activations(subject.model, subject.tokenizer, self.split.kept, **reading)
        (along,) = self.vector.layer_activations.values()
        found: list[float] = []
        for one, other in zip(*(side[self.layer] for side in sides), strict=True):
            found += ((one - other).double().cpu() @ along.double().cpu()).tolist()
        return found

    def slopes(self) -> pd.DataFrame:
        """Return the slope of each prompt over the multiplier, in units of the chosen one."""
        (one,) = self.directions.grid({VECTOR: {self.layer: self.multiplier}}).steering.values()
        grid = Grid({VECTOR: one}, coeffs=(-1.0, -0.5, 0.5, 1.0))
        return steerability(self.subject.rows(grid, self.split.judging, judging=True), "metric")

    def cost(self, texts: Sequence[Prompt] | None) -> dict[str, Any]:
        """Say how much more perplexing other text becomes, under the vector and random directions.

        Args:
            texts: by default what the unsteered model writes; where it writes nothing, the prompts.
                Of these, those that are too long or too short to be read again are left out.
        """
        what = "other texts"
        if texts is None:
            texts, what = self._own_texts()
        settings = settings_of(self.chosen).items()
        kinds = self.directions.kinds
        if not texts:
            return {"ratio": np.nan, "random": np.nan, "texts": 0, "what": what}
        chosen = {one: place for one, place in settings if kinds[one] != UNUSED}
        costs = self.subject.perplexities(texts, self.directions.grid(chosen))
        table = perplexity_ratio_by_cell(costs)
        ratios = dict(zip(table["steering"].tolist(), table["ratio"].tolist(), strict=True))
        found = {"ratio": ratios.pop(VECTOR), "random": float(np.median([*ratios.values()]))}
        return found | {"texts": len(texts), "what": what}

    def _own_texts(self) -> tuple[list[str], str]:
        plain, what = self.rows.query("kind == 'unsteered'"), "the prompts"
        texts = plain["prompt"]
        if not self.subject.next_token:
            texts, what = texts + plain["completion"], "what the unsteered model writes"
        return [text for text in dict.fromkeys(texts.tolist()) if self.subject.reads(text)], what

    def rival(self, instructions: Sequence[str]) -> dict[str, Any] | None:
        """Measure prompting: the instruction that is best on one half, on the other.

        Args:
            instructions: see `competing`.

        Returns:
            None where there are none, or none under which the metric has a value.
        """
        if not instructions:
            return None
        trial = [asked(one, prompt) for one in instructions for prompt in self.split.choosing]
        values = self.subject.unsteered(trial).reshape(len(instructions), -1)
        means = [interval(of_one)[0] for of_one in values]
        if np.isnan(means).all():
            return None
        best = instructions[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))]
        prompts = [asked(best, prompt) for prompt in self.split.judging]
        moved = self.subject.unsteered(prompts, judging=True) - self.unsteered
        found: dict[str, Any] = {"instruction": best}
        found |= dict(zip(("mean", "low", "high"), interval(moved)))
        return found | dict(zip(("more", "more low", "more high"), interval(self.moves - moved)))

    def examples(self) -> list[dict[str, str]]:
        """Return what is written after some prompts, unsteered and steered."""
        if self.subject.next_token:
            return []
        first = self.rows.query("sample == 0")
        plain, steered = (
            dict(zip(part["prompt"].tolist(), part["completion"].tolist()))
            for part in (first.query("steering == @name") for name in ("unsteered", VECTOR))
        )
        return [
            {"prompt": prompt, "unsteered": text, "steered": steered[prompt]}
            for prompt, text in [*plain.items()][:EXAMPLES]
        ]

    def data(self) -> dict[str, Any]:
        """Return where the vector comes from, as far as another run needs it."""
        subject, split = self.subject, self.split
        prompts = [prompt_text(subject.tokenizer, p) for p in (*split.choosing, *split.judging)]
        return {
            "model": model_name(subject.model),
            "metric": _name(subject.metric),
            "of": "the next token" if subject.next_token else "completions",
            "pairs to train on": len(split.trained),
            "pairs kept back": len(split.kept),
            "prompts to choose on": len(split.choosing),
            "prompts to judge on": len(split.judging),
            "seed": subject.seed,
            "budget": repr(subject.budget),
            "model, SHA-256": _sha(identity_of_model(subject.model)),
            "pairs, SHA-256": split.pairs_sha256,
            "prompts, SHA-256": _sha(prompts),
            HASH: hash_of_tensors(self.vector.layer_activations.values()),
        }


UNUSED = "unrelated"  # vectors whose cost nobody asks for


def competing(subject: Subject, split: Split, given: Sequence[str] | None) -> list[str]:
    """Return the instructions that compete.

    Args:
        subject: the model.
        split: the prompts, and pairs.
        given: all of the user's compete. By default the positive sides of some pairs do, as many as
            the budget says, of those that fit in front of every prompt.

    Raises:
        ValueError: one of the user's is too long.
    """
    prompts = [*split.choosing, *split.judging]
    if given is not None:
        for one in given:
            subject.check([asked(one, prompt) for prompt in prompts])
        return list(dict.fromkeys(given))
    found: list[str] = []
    for side in dict.fromkeys(str(pair.positive_str) for pair in split.trained if _is_text(pair)):
        if len(found) == subject.budget.instructions:
            break
        try:
            subject.check([asked(side, prompt) for prompt in prompts])
        except ValueError:
            continue
        found.append(side)
    return found


def _is_text(pair: SteeringVectorTrainingSample) -> bool:
    return isinstance(pair.positive_str, str)


def shares_of(slopes: pd.DataFrame) -> dict[str, Any]:
    """Return the row of `steerable_shares` for the only steering."""
    (row,) = steerable_shares(slopes).to_dict("records")
    return {name: row[name] for name in SHARES}


def settings_of_vector(tried: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what was tried of the vector, setting by setting."""
    rows = [row for row in tried.to_dict("records") if row["steering"] == VECTOR]
    names = ("target_kl", "multiplier", "kl", "effect", "error")
    return [{"layer": int(row["layer"])} | {name: row[name] for name in names} for row in rows]


def asked(instruction: str, prompt: Prompt) -> Prompt:
    """Return a prompt with an instruction in front of it."""
    if isinstance(prompt, str):
        return f"{instruction} {prompt}"
    first, *others = prompt
    return [{**first, "content": f"{instruction}\n\n{first['content']}"}, *others]


def _name(metric: Any) -> str:
    name = getattr(metric, "__name__", type(metric).__name__)
    return "the metric" if name == "<lambda>" else name


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
