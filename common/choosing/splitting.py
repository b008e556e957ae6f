"""What is used for what: pairs to train on and to keep back, prompts to choose and to judge on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.passes.prompts import Prompt, check_prompts, prompt_text
from common.vectors.pairs import Sample, SteeringVectorTrainingSample, hash_of_pairs, samples_of

FEWEST_PROMPTS = 8
FEWEST_PAIRS, FEWEST_KEPT = 10, 5  # 5 of 5 by chance: p = 0.03


@dataclass(frozen=True)
class Split:
    """What is used for what.

    Attributes:
        trained: the pairs that the vector is trained on.
        kept: those that are kept back, see `keep_back`; none where there are fewer than 10.
        choosing: the prompts on which the setting is chosen.
        judging: those on which it is judged.
        pairs_sha256: a hash of the pairs as they were given.
    """

    trained: list[SteeringVectorTrainingSample]
    kept: list[SteeringVectorTrainingSample]
    choosing: list[Prompt]
    judging: list[Prompt]
    pairs_sha256: str = ""


def split_at_random(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Sample],
    prompts: Sequence[Prompt],
    most: int,
    seed: int,
) -> Split:
    """Split pairs and prompts at random.

    Args:
        tokenizer: shows prompts that are messages.
        pairs: contrast pairs; of equal ones the first counts.
        prompts: different ones.
        most: on so many prompts at most the setting is chosen, and on twice as many judged.
        seed: the same split for the same seed.

    Raises:
        ValueError: a text instead of a list, something that is no pair, fewer than 2 pairs, fewer
            than 8 prompts, or one that is there twice.
    """
    check_prompts(prompts if isinstance(prompts, str) else (prompts := list(prompts)))
    given = samples_of(pairs if isinstance(pairs, str) else list(pairs))
    samples = list({hash_of_pairs([one]): one for one in given}.values())
    if len(samples) < 2:
        raise ValueError(f"expected 2 different pairs or more, got {len(samples)}")
    shown = [prompt_text(tokenizer, prompt) for prompt in prompts]
    if twice := [text for text in dict.fromkeys(shown) if shown.count(text) > 1]:
        raise ValueError(f"expected different prompts, got {twice[0]!r} twice")
    if len(shown) < FEWEST_PROMPTS:
        raise ValueError(f"expected {FEWEST_PROMPTS} prompts or more, got {len(shown)}")
    random = np.random.default_rng(seed)
    mixed = [samples[number] for number in random.permutation(len(samples))]
    trained, kept = keep_back(mixed)
    order = [prompts[number] for number in random.permutation(len(shown))]
    half = min(most, len(order) // 2)
    parts = trained, kept, order[:half], order[half : 3 * half]
    return Split(*parts, hash_of_pairs(given))


def keep_back(pairs: list[SteeringVectorTrainingSample]) -> tuple[list, list]:
    """Part pairs into those that are trained on, and some that are kept back: a third, or fewer.

    A text is on one side of the parting only, and in one kept pair only: copies would be counted
    as evidence. Pairs that share a text with a kept one are used for nothing.

    Returns:
        The pairs to train on, and those kept back; none of these where there are too few.
    """
    most = max(FEWEST_KEPT, len(pairs) // 3) if len(pairs) >= FEWEST_PAIRS else 0
    for count in range(most, FEWEST_KEPT - 1, -1):
        kept: list[SteeringVectorTrainingSample] = []
        texts: set[str] = set()
        for pair in pairs:
            if len(kept) < count and not texts & _texts(pair):
                kept.append(pair)
                texts |= _texts(pair)
        trained = [pair for pair in pairs if not texts & _texts(pair)]
        if len(kept) == count and len(trained) >= count:
            return trained, kept
    return pairs, []


def _texts(pair: SteeringVectorTrainingSample) -> set[str]:
    """Both sides, alike where they differ in blanks at their ends only."""
    sides = pair.positive_str, pair.negative_str
    return {side.strip() if isinstance(side, str) else json.dumps(side) for side in sides}
