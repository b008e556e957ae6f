"""What is tried: a vector and its controls, at layers and strengths, on prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number, integer, is_integer, layer_list
from common.measuring.effects import effect_by_cell, with_numbers
from common.passes.prompts import Prompt
from common.sweeping.grid import Grid
from common.sweeping.strength import calibrate_grid
from common.sweeping.sweep import sweep, sweep_logits, sweep_perplexity
from common.sweeping.texts import Texts
from common.texts.sampling import Sampling
from common.vectors.directions import random_directions
from common.vectors.reading import read_activations
from common.vectors.steering_vector import SteeringVector

VECTOR = "vector"
ROUNDING = 1e-5  # of an activation, as a share of its length
TOLERANCE = 0.1  # of the divergence, as a share
FEWEST = 19  # with fewer controls none of them may win, and p is still above 0.05
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9)


@dataclass(frozen=True)
class Budget:
    """How much is tried.

    Args:
        layers: at most so many, spread evenly over the model.
        strengths: divergences in nats at which each of them is tried.
        controls: so many random directions, and as many unrelated vectors.
        prompts: on at most so many the setting is chosen, and on twice as many judged.
        calibrating: on at most so many of them the strength is measured.
        instructions: how many prompts in words compete, where the user names none.
        sampling: how completions are drawn and how long they are.
        per_prompt: completions of each prompt on which the setting is chosen; twice as many where
            it is judged, unless they are greedy.

    Raises:
        ValueError: a number that is too small, or not a number.
    """

    layers: int = 4
    strengths: tuple[float, ...] = (0.3, 1.0)
    controls: int = FEWEST
    prompts: int = 12
    calibrating: int = 6
    instructions: int = 4
    sampling: Sampling = DRAWN
    per_prompt: int = 1

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("prompts", 4), ("calibrating", 1), ("per_prompt", 1)):
            integer(getattr(self, name), name, least)
        integer(self.instructions, "instructions")
        integer(self.controls, "controls", FEWEST)
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"expected a Sampling as sampling, got {self.sampling!r}")
        if self.per_prompt > 1 and not self.sampling.temperature:
            raise ValueError(
                f"{self.per_prompt} completions of each prompt need a temperature above 0: greedy"
                " ones are all the same"
            )
        if isinstance(self.strengths, str | int | float):
            raise ValueError(f"expected a list of strengths in nats, got {self.strengths!r}")
        given = [finite_number(strength, "strength") for strength in self.strengths]
        if not given or min(given) <= 0 or len(set(given)) < len(given):
            raise ValueError(f"expected different strengths above 0, in nats, got {given}")
        object.__setattr__(self, "strengths", tuple(given))


BUDGETS = {
    "minutes": Budget(),
    "hours": Budget(
        layers=12,
        strengths=(0.1, 0.3, 1.0, 2.0),
        controls=39,
        prompts=24,
        calibrating=16,
        instructions=8,
        sampling=Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9),
        per_prompt=2,
    ),
}


def budget_of(given: str | Budget) -> Budget:
    """Return a budget, also one that goes by its name.

    Raises:
        ValueError: neither a budget nor a known name.
    """
    if isinstance(given, Budget):
        return given
    if not isinstance(given, str) or given not in BUDGETS:
        raise ValueError(f"expected a Budget, or one of {', '.join(BUDGETS)}, got {given!r}")
    return BUDGETS[given]


def layers_to_try(blocks: int, count: int, given: Sequence[int] | None) -> list[int]:
    """Return layers among which to choose, counted from the first.

    Args:
        blocks: how many the model has.
        count: at most so many, in the middles of equal parts of the model, where none are given.
        given: which ones; negative ones are counted from the last.

    Raises:
        ValueError: layers that the model does not have, or none.
    """
    if given is None:
        count = min(blocks, count)
        return [(2 * number + 1) * blocks // (2 * count) for number in range(count)]
    layers = layer_list(given)
    if not layers or not all(is_integer(one) and -blocks <= one < blocks for one in layers):
        raise ValueError(f"expected layers from 0 to {blocks - 1}, got {layers}")
    return [one % blocks for one in layers]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, by a metric.

    Attributes:
        model: a causal language model.
        tokenizer: its tokenizer.
        metric: of the completions, or of the logits of the next token.
        next_token: whether it is of these.
        budget: how much is tried.
        seed: of the completions.
        bos: see `prompt_ids`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metric: Any
    next_token: bool
    budget: Budget
    seed: int
    bos: bool | None

    def rows(self, grid: Grid, prompts: Sequence[Prompt], judging: bool = False) -> pd.DataFrame:
        """Sweep a grid; the column of the metric is called "metric".

        Args:
            grid: what is swept.
            prompts: on which prompts.
            judging: with as many completions as a judgement has.

        Raises:
            ValueError: what a sweep refuses; a metric that does not give one number.
        """
        given, metrics = (self.model, self.tokenizer, grid, prompts), {"metric": self.metric}
        if self.next_token:
            return sweep_logits(*given, metrics, prepend_bos=self.bos, show_progress=False)
        sampling, count = self.budget.sampling, self.budget.per_prompt
        rows = sweep(
            *given,
            metrics,
            sampling=sampling,
            per_prompt=2 * count if judging and sampling.temperature else count,
            seed=self.seed,
            prepend_bos=self.bos,
            show_progress=False,
        )
        if "metric" in rows:
            return rows
        columns = [name for name in rows if str(name).startswith("metric_")]
        if len(columns) > 1:
            raise ValueError(
                "expected a metric that gives one number for each text, got columns:"
                f" {', '.join(one.removeprefix('metric_') for one in columns)}. Of a pipeline take"
                " one, as in lambda texts: [found['score'] for found in pipeline(texts)]"
            )
        return rows.rename(columns={columns[0]: "metric"})

    def unsteered(self, prompts: Sequence[Prompt], judging: bool = False) -> np.ndarray:
        """Measure prompts as they are, in their order; means over completions with a value."""
        rows = self.rows(self._nothing(), prompts, judging)
        plain = with_numbers(rows, "metric").query("kind == 'unsteered'")
        values = plain["metric"].to_numpy(dtype=float).reshape(len(prompts), -1)
        return pd.DataFrame(values).mean(axis="columns").to_numpy()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that leave no room for what is written after them.

        Raises:
            ValueError: one that is too long for the model, or empty.
        """
        new = 1 if self.next_token else self.budget.sampling.max_new_tokens
        Texts(self.model, self.tokenizer, prompts, self.bos).check((), new)

    def perplexities(self, texts: Sequence[Prompt], grid: Grid | None = None) -> pd.DataFrame:
        """Measure how likely the model finds texts, unsteered and under a grid.

        Raises:
            ValueError: what `sweep_perplexity` refuses.
        """
        bos = True if self.bos is None else self.bos
        given = self.model, self.tokenizer, self._nothing() if grid is None else grid, texts
        return sweep_perplexity(*given, prepend_bos=bos, show_progress=False)

    def reads(self, text: Prompt) -> bool:
        """Say whether a text is one that `perplexities` can measure."""
        try:
            read = Texts(self.model, self.tokenizer, [text], True if self.bos is None else self.bos)
            read.check(())
        except ValueError:
            return False
        return read.lengths[0] > 1

    def _nothing(self) -> Grid:
        zero = torch.zeros(self.model.config.get_text_config().hidden_size)
        return Grid({"nothing": SteeringVector({0: zero})})


@dataclass
class Directions:
    """A vector and its controls.

    Attributes:
        vectors: by name, with a vector for each layer.
        kinds: by name, "vector", "random" or "unrelated".
    """

    vectors: dict[str, SteeringVector]
    kinds: dict[str, str] = field(default_factory=dict)

    def grid(self, chosen: Mapping[str, Mapping[int, float]]) -> Grid:
        """Return a grid of some of them, by name and layer with their multipliers, at 1."""
        scaled = {
            name: SteeringVector(
                {layer: x * self.vectors[name].layer_activations[layer] for layer, x in by.items()},
                self.vectors[name].layer_type,
            )
            for name, by in chosen.items()
        }
        first, *others = scaled
        controls = {name: scaled[name] for name in others}
        return Grid({first: scaled[first]}, coeffs=(1.0,), controls=controls)


def with_controls(
    subject: Subject, vector: SteeringVector, prompts: Sequence[Prompt]
) -> Directions:
    """Return a vector with its controls.

    Random directions are spread evenly over all of the space. Unrelated vectors are random mixtures
    of what some prompts differ by: directions in which activations really vary, and which have
    nothing to do with the pairs.
    """
    layers, count = list(vector.layer_activations), subject.budget.controls
    found, kinds = {VECTOR: vector}, {VECTOR: VECTOR}
    for number in range(count):
        name, drawn = f"random {number + 1}", {}
        for layer, one in vector.layer_activations.items():
            seed = 1000 * (1000 * subject.seed + number) + layer
            drawn[layer] = random_directions(len(one), 1, seed)[0].to(one)
        found[name], kinds[name] = SteeringVector(drawn, vector.layer_type), "random"
    read = read_activations(
        subject.model,
        subject.tokenizer,
        prompts,
        layers,
        vector.layer_type,
        batch_size=16,
        prepend_bos=subject.bos,
    )
    random = np.random.default_rng(subject.seed)
    for number in range(count):
        name, weights = f"unrelated {number + 1}", torch.tensor(random.normal(size=len(prompts)))
        mixed = {
            layer: (weights @ _differences(acts, layer)).to(acts) for layer, acts in read.items()
        }
        found[name], kinds[name] = SteeringVector(mixed, vector.layer_type), "unrelated"
    return Directions(found, kinds)


def _differences(acts: torch.Tensor, layer: int) -> torch.Tensor:
    """What activations [prompt, d_model] differ by, in float64.

    Raises:
        ValueError: they are the same, but for rounding.
    """
    wide = acts.double().cpu()
    apart = wide - wide.mean(0)
    if apart.norm(dim=1).max() <= ROUNDING * wide.norm(dim=1).max():
        raise ValueError(
            f"at layer {layer} the activations of all prompts are the same: there is nothing to"
            " make unrelated vectors of; expected prompts that end differently, or another layer"
        )
    return apart


def try_strength(
    subject: Subject, directions: Directions, prompts: Sequence[Prompt], target_kl: float
) -> pd.DataFrame:
    """Try all directions at all layers, each at a multiplier of its own that gives a divergence.

    Returns:
        By direction and layer: `steering`, `kind`, `layer`, `target_kl`, `multiplier`, `kl`,
        `effect` (mean move of the metric over the prompts), `error` (its standard error).
    """
    everything = list(directions.vectors)
    grid = directions.grid(
        {
            name: dict.fromkeys(vector.layer_activations, 1.0)
            for name, vector in directions.vectors.items()
        }
    )
    found = calibrate_grid(
        subject.model,
        subject.tokenizer,
        grid,
        list(prompts)[: subject.budget.calibrating],
        target_kl,
        new_tokens=subject.budget.sampling.max_new_tokens,
        tolerance=TOLERANCE,
        prepend_bos=subject.bos,
    )
    chosen: dict[str, dict[int, float]] = {name: {} for name in everything}
    for name, layer, coeff in zip(found["steering"], found["layer"], found["coeff"], strict=True):
        chosen[name][int(layer)] = float(coeff)
    rows = subject.rows(directions.grid(chosen), prompts)
    place = ["steering", "layer"]
    effects = effect_by_cell(rows, "metric").filter([*place, "effect", "error"])
    found = found.rename(columns={"coeff": "multiplier"}).merge(effects, on=place)
    found = found.assign(kind=found["steering"].map(directions.kinds), target_kl=target_kl)
    return found.filter([*place, "kind", "target_kl", "multiplier", "kl", "effect", "error"])


def settings_of(chosen: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Return what each direction chose, as `Directions.grid` takes it."""
    columns = (chosen[name].tolist() for name in ("steering", "layer", "multiplier"))
    return {name: {int(layer): float(x)} for name, layer, x in zip(*columns, strict=True)}
