"""Choose where and how strongly to steer, in one call, with evidence that can be checked."""

import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import first_name, integer
from common.choosing.card import CONTROLS, PICTURES, VectorCard
from common.choosing.evidence import Evidence, competing, settings_of_vector, shares_of
from common.choosing.judging import beats, gentlest_of_the_best, moves_the_right_way, tells_apart
from common.choosing.splitting import FEWEST_PAIRS, split_at_random
from common.choosing.trying import (
    Budget,
    Subject,
    budget_of,
    layers_to_try,
    try_strength,
    with_controls,
)
from common.measuring.logit_metrics import LogitMetric
from common.measuring.metrics import Metric
from common.passes.prompts import Prompt
from common.places.blocks import get_blocks
from common.progress import DELAY, progress_bar
from common.vectors.files import write_whole
from common.vectors.layer_vectors import CARD
from common.vectors.pairs import Sample
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector

PACKAGES = ("torch", "transformers")
TRAINING = {
    *("layers", "layer_type", "aggregator", "read_token_index", "batch_size", "prepend_bos")
}
LARGEST_SEED = 10**9  # seeds of controls are made of it, in 64 bits


@dataclass(frozen=True)
class Choice:
    """What `choose` returned.

    Attributes:
        vector: of the chosen layer, with its card in the metadata.
        layer: the chosen layer.
        multiplier: the chosen multiplier: `vector.apply(model, multiplier=multiplier)`.
        card: what is known of it.
    """

    vector: SteeringVector
    layer: int
    multiplier: float
    card: VectorCard

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> list[Path]:
        """Write the vector, and its card as a page beside it.

        Args:
            path: of the vector, for example "love.safetensors". The pages are "love.md", with its
                pictures "love-controls.png" and "love-slopes.png", and "love.html", which has them
                inside.
            overwrite: replace files that are there.

        Returns:
            The files, the vector first.

        Raises:
            FileExistsError: one of them is there, and `overwrite` is False, or it is a folder;
                nothing was written.
            ValueError: another ending than ".safetensors".
        """
        path = Path(path)
        vector, markdown, html, *pictures = files = files_of(path)
        refuse_existing(files, overwrite)
        self.vector.save(vector, overwrite)  # first: nothing that is drawn can lose it
        contents = dict(zip(pictures, self.card.pictures().values(), strict=True))
        contents[markdown] = self.card.markdown(f"{path.stem}-").encode()
        contents[html] = self.card.html().encode()
        for file, content in contents.items():
            write_whole(file, overwrite, lambda name, content=content: _write(name, content))
        return files


def files_of(path: Path) -> list[Path]:
    """Return the files of a choice: the vector, its page twice, and the pictures of the first.

    Raises:
        ValueError: the name of the vector does not end in ".safetensors".
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a path that ends in .safetensors, got {str(path)!r}")
    pages = [path.with_suffix(ending) for ending in (".md", ".html")]
    return [path, *pages, *(path.with_name(f"{path.stem}-{name}.png") for name in PICTURES)]


def refuse_existing(
    files: Sequence[Path],
    overwrite: bool = False,
    advice: str = "give another name, or overwrite=True",
) -> None:
    """Refuse to overwrite a file, unless it may be; a folder is never overwritten.

    Raises:
        FileExistsError: one of them is there.
    """
    if folders := [file for file in files if file.is_dir()]:
        raise FileExistsError(f"{str(folders[0])!r} is a folder: give another name")
    if overwrite:
        return
    if there := [file for file in files if file.exists()]:
        raise FileExistsError(f"{str(there[0])!r} is there already: {advice}")


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Sample],
    prompts: Sequence[Prompt],
    metric: Metric | LogitMetric,
    budget: str | Budget = "minutes",
    *,
    name: str = "the vector",
    next_token: bool | None = None,
    other_texts: Sequence[Prompt] | None = None,
    instructions: Sequence[str] | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **training: Any,
) -> Choice:
    """Train a steering vector, choose its layer and multiplier, and say how far to trust it.

    Pairs and prompts are split at random. The vector is trained on most of the pairs. On half of
    the prompts the setting is chosen: layers at several strengths, each measured as a divergence,
    so that all directions are compared at the same one (`calibrate_grid`); of the settings whose
    effect is within one standard error of the largest, the gentlest. Random directions, and
    unrelated vectors (mixtures of what prompts differ by), choose in the same way. On the other
    half all are judged, each at its own setting. The vector is better than random where its effect
    lies above 0, is larger than those of both kinds of controls (p ≤ 0.05 each), and it tells the
    sides of the pairs apart that were kept back (p ≤ 0.05). All of these have to hold: a random
    direction fails at the controls and random labels at the pairs, nineteen times in twenty.

    Unrelated vectors lie in as many dimensions as there are prompts to choose on, less one: with
    few prompts they are much alike, and random directions are the stricter control.

    Args:
        model: a causal language model; as it was afterwards and after any exception.
        tokenizer: its tokenizer.
        pairs: contrast pairs; of a pair that is there twice the second does not count. With fewer
            than 10 none are kept back: nobody knows then whether the labels mean something, and no
            card calls the vector better than random. Of pairs that share texts, only some are used.
        prompts: texts, or messages for a chat model: what the model will be used for. 24 or more
            are better than the 8 that are needed.
        metric: one number for each completion (see `add_metric_cols`), or for each row of logits
            (see `sweep_logits`, `ab_metric`). The positive sides of the pairs are to raise it.
        budget: "minutes", "hours", or a `Budget`.
        name: of the vector, for the card.
        next_token: whether the metric is of logits, so that no text is written. By default it is
            where its first argument is called `steered`, as that of `ab_metric` is.
        other_texts: texts that steering should leave alone, to see how much likelier or less likely
            they become; by default what the unsteered model writes after the prompts.
        instructions: prompts in words, which compete: each is put in front of a prompt, and the
            best on the first half is judged on the other. By default the positive sides of some
            pairs, as many as the budget says and as fit in front.
        seed: of the splits, the controls and the completions.
        show_progress: show a bar where it takes more than five seconds.
        training: more of `train_steering_vector`: `aggregator`, `read_token_index`, `layer_type`,
            `batch_size`, `prepend_bos` (of everything that is run here), and `layers`, among which
            to choose.

    Returns:
        The vector of the chosen layer, layer, multiplier, and the card.

    Raises:
        ValueError: an unknown budget; fewer than 2 pairs or 8 different prompts; a metric that
            cannot be called, does not give one number, or none at all on these prompts; one text
            where several are expected; what training, calibration and sweeps refuse.
    """
    budget, seed = budget_of(budget), integer(seed, "seed")
    if seed > LARGEST_SEED:
        raise ValueError(f"expected a seed of {LARGEST_SEED:,} at most, got {seed:,}")
    if not callable(metric):
        raise ValueError(f"expected a function as metric, got {metric!r}")
    if unknown := sorted(training.keys() - TRAINING):
        raise ValueError(f"expected of training {', '.join(sorted(TRAINING))}; got {unknown[0]!r}")
    if instructions is not None:
        given: list[Any] = [None] if isinstance(instructions, str) else list(instructions)
        if not all(isinstance(one, str) and one.strip() for one in given):
            raise ValueError(f"expected a list of texts as instructions, got {instructions!r}")
        instructions = given
    if next_token is None:
        next_token = first_name(metric) == "steered"
    split = split_at_random(tokenizer, pairs, prompts, budget.prompts, seed)
    bos = training.get("prepend_bos")
    subject = Subject(model, tokenizer, metric, next_token, budget, seed, bos)
    blocks = len(get_blocks(model)[1])
    training["layers"] = layers_to_try(blocks, budget.layers, training.get("layers"))
    # What would be refused later, before anything that takes long.
    subject.check([*split.choosing, *split.judging])
    instructions = competing(subject, split, instructions)
    if other_texts is not None:
        other_texts = other_texts if isinstance(other_texts, str) else list(other_texts)
        subject.perplexities(other_texts)
    subject.unsteered(split.choosing)
    with _steps(len(budget.strengths) + 4, show_progress) as step:
        step("training")
        vector = train_steering_vector(model, tokenizer, split.trained, **training)
        training.pop("aggregator", None)
        directions = with_controls(subject, vector, split.choosing)
        tables = []
        for strength in budget.strengths:
            step(f"{len(directions.vectors)} directions at {strength:g} nats")
            tables.append(try_strength(subject, directions, split.choosing, strength))
        tried = pd.concat(tables, ignore_index=True)
        step("judging")
        found = Evidence.gather(subject, split, directions, gentlest_of_the_best(tried))
        answers = [
            moves_the_right_way(*found.effect[1:]),
            *(beats(found.effect[0], found.controls[kind], CONTROLS[kind]) for kind in CONTROLS),
            tells_apart(found.apart(training), FEWEST_PAIRS),
        ]
        step("prompting")
        rival = found.rival(instructions)
        step("what it costs, and for whom it fails")
        slopes = found.slopes()
        card = VectorCard(
            name=name,
            better=all(answer.passed for answer in answers),
            judged=[asdict(answer) for answer in answers],
            place=found.place(),
            effect=found.effect_in_full(),
            controls=found.controls,
            cost=found.cost(other_texts),
            slopes=dict(zip(slopes["prompt"].tolist(), slopes["slope"].tolist())),
            shares=shares_of(slopes),
            rival=rival,
            examples=found.examples(),
            tried=settings_of_vector(tried),
            data=found.data(),
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
        )
    kept = found.vector
    kept = replace(kept, metadata=kept.metadata | {CARD: card.to_json()})
    return Choice(kept, found.layer, found.multiplier, VectorCard.of(kept))


@contextmanager
def _steps(count: int, show: bool) -> Iterator[Any]:
    """A bar of steps; what it gives is called with the name of each as it begins."""
    with progress_bar(count, "Choosing", "step", show) as bar:
        begun: list[float] = []

        def step(title: str) -> None:
            bar.update(1 if begun else 0)
            begun.append(time.monotonic())
            long = begun[-1] - begun[0] > DELAY
            bar.set_description(f"Choosing: {title}", refresh=long)

        yield step
        bar.update(1)


def _write(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
