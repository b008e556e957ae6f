"""What the playground is compared with: 200 cases, and what the library computes for them."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from common import (
    SteeringVector,
    completions,
    encode,
    generate,
    logits,
    prompt_ids,
    random_directions,
    train_steering_vector,
)
from common.texts.sampling import TopP
from embedded_model.prompts import SHOWN_PROMPTS, VISITOR_SENTENCES, VISITOR_WORDS
from repository.playground import TOP_P

CONDITIONS = ("unsteered", "steered", "random")
ODD_PROMPTS = [
    "I think dogs are ",
    "  two spaces,   three",
    "\tA tab\nand a line\r\n",
    "It's what we'd say; they'll, I've, you're",
    "Größe, naïve, Ångström — “quoted” … 3½ m²",
    "\u1100\u1161\u11a8 한국어 日本語 𝒳𝒴",
    "👩‍👩‍👧 🏳️‍🌈 flags 🇩🇪",
    "no\u00a0break, line\u2028separator, next\u0085line, \ufeffmark, \u180e\u200b",
    "e\u0301 combines, \u0627\u0644\u0633\u0644\u0627\u0645 runs the other way",
    "١٢٣ ४५ Ⅷ 2024",
    "a\u0000b \u0007 \u001c\u001d",
    "<|endoftext|>The soup<|endoftext|> is",
    "<|endoftext",
    "ooo oooo ooooo sssss ppppppp fff bbb cccccc",
    "x",
]
# Of 180, 249 and 256 tokens: there is room, for seven more, for none.
LONG_PROMPTS = ["the the the " * 60, "I think " * 124 + "so", "I think " * 127 + "I think"]
HALF_A_LETTER = "half of 😀: \ud83d"  # no link can hold it
REFUSED_PROMPTS = ["", "x" * 300, "I love you. " * 90, HALF_A_LETTER]
PAIRS = [("Love", "Hate"), *VISITOR_WORDS, *VISITOR_SENTENCES, ("Fröhlich 😀", "traurig\n")]
COEFFS = (15.6, -15.6, 7.25, -23.4, 0.0)


class Case(NamedTuple):
    """Settings of the page, by the names that its links have."""

    prompt: str
    toward: str = "Love"
    away: str = "Hate"
    layer: int = 3
    coeff: float = 15.6
    length: int = 12
    sampled: bool = False
    seed: int = 0
    randomSeed: int = 0


class Answer(NamedTuple):
    """What is right for a case; of one that is refused there is nothing.

    Attributes:
        ids: of the prompt.
        logits: after the prompt, under each condition, [3, vocab].
        texts: completions under each condition.
    """

    ids: list[int]
    logits: Tensor
    texts: list[str]


def many_cases(layers: int, count: int = 200) -> list[Case]:
    """Return different cases: every layer with every coefficient, odd prompts, other pairs."""
    prompts = itertools.chain(LONG_PROMPTS, itertools.cycle([*ODD_PROMPTS, *SHOWN_PROMPTS]))
    grid = itertools.cycle(itertools.product(COEFFS, range(layers)))
    pairs = itertools.cycle([PAIRS[0], *PAIRS])
    found = [Case(prompt) for prompt in REFUSED_PROMPTS]
    for number in range(count - len(found)):
        coeff, layer = next(grid)
        settings = {"length": 6 + number % 9, "sampled": number % 4 == 3, "seed": number}
        found.append(Case(next(prompts), *next(pairs), layer, coeff, **settings, randomSeed=number))
    return found


class SeedRule(LogitsProcessor):
    """Samples one text as the page does: each token takes one number of torch's generator.

    The tokens that top_p keeps lie side by side in the order of their ids, each as wide as its
    probability, and the number falls on one of them.
    """

    def __init__(self, seed: int):
        self.generator, self.top_p = torch.Generator().manual_seed(seed), TopP(TOP_P)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [1, vocab] at whose only finite place the sampled token is."""
        ends = self.top_p(input_ids, scores)[0].double().softmax(-1).cumsum(-1)
        token = int((ends > torch.rand(1, generator=self.generator) * ends[-1]).nonzero()[0])
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    vector: SteeringVector | None = None,
) -> Answer | None:
    """Compute a case with the library; None where it refuses the prompt.

    Args:
        model: the embedded model.
        tokenizer: its tokenizer.
        case: the settings.
        vector: of a file, which steers instead of the pair.
    """
    positions = model.config.n_positions
    try:
        (ids,) = prompt_ids(tokenizer, [case.prompt])
    except ValueError:
        return None
    if not 0 < len(ids) <= positions:
        return None
    inputs = encode(tokenizer, [case.prompt], prepend_bos=None)
    if vector is None:
        pair = [(case.toward, case.away)]
        vector = train_steering_vector(model, tokenizer, pair, layers=[case.layer]).unit()
    norms = vector.norm()
    noise = random_directions(model.config.n_embd, len(norms), case.randomSeed)
    control = {layer: norms[layer] * row for layer, row in zip(sorted(norms), noise, strict=True)}
    found: list[tuple[Tensor, str]] = []
    for direction in (None, vector, SteeringVector(control)):
        options: dict[str, Any] = {"max_new_tokens": min(case.length, positions - len(ids))}
        if case.sampled:
            options["logits_processor"] = [SeedRule(case.seed)]
        if direction is None:
            direction, coeff = vector, 0.0
        else:
            coeff = case.coeff / max(norms.values())
        with direction.apply(model, multiplier=coeff):
            after = logits(model, inputs)[0, -1]
            written = generate(model, inputs, **options) if options["max_new_tokens"] else None
        text = "" if written is None else completions(tokenizer, inputs, written)[0]
        found.append((after, text))
    return Answer(ids, torch.stack([it for it, _ in found]), [text for _, text in found])
