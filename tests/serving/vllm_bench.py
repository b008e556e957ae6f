"""What the laws of vLLM share: tiny models, engines, and what transformers says.

Nothing here is imported where vLLM is missing.
"""

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from common.serving.offers import save_additions
from common.serving.requests import steering_args
from common.vectors.activation_additions import ActivationAddition, apply_activation_additions
from common.vectors.steering_vector import SteeringVector

NEEDS_VLLM = [
    pytest.mark.engines,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not in this environment: `make engines` sets up one and runs this",
    ),
]
# Heads of 32, since the attention of vLLM for CPUs has no smaller ones.
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TINY: dict[str, type[PretrainedConfig]] = {
    "Llama": LlamaConfig,
    "Qwen3": Qwen3Config,
    "Gemma": GemmaConfig,
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights so large that greedy texts keep moving."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TINY[name](**SIZES)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.15)
    return model


class Ask(NamedTuple):
    """A request: its prompt, what steers it, and how much it writes."""

    prompt: tuple[int, ...]
    name: str | None = None
    coeff: float = 1.0
    layers: tuple[int, ...] | None = None
    min_token_index: int | None = None
    length: int = 12

    def args(self) -> dict[str, Any] | None:
        """What the request brings."""
        if self.name is None:
            return None
        return steering_args(self.name, self.coeff, self.layers, self.min_token_index)


class Answer(NamedTuple):
    """Token ids, and the logarithm of the probability of each."""

    tokens: list[int]
    logprobs: list[float]


class Bench:
    """A model in transformers, what steers it, and the files that an engine is started with.

    Args:
        model: a causal language model.
        folder: where the model and the vectors are written.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, tokenizer: Any = None):
        self.model, self.folder = model, folder
        model.save_pretrained(folder / "model")
        model.generation_config.eos_token_id = None  # here texts have a length, and no end
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "model")
        config = model.config
        generator = torch.Generator().manual_seed(1)
        last = config.num_hidden_layers - 1
        self.vectors = {
            name: SteeringVector(
                {n: torch.randn(config.hidden_size, generator=generator) for n in layers}
            )
            for name, layers in {"one": [1], "two": [0, last], "all": range(last + 1)}.items()
        }
        self.additions = {
            "front": [
                ActivationAddition(1.0, 2, tokens=[5, 9, 11]),
                ActivationAddition(-1.0, 2, tokens=[7, 3]),
            ]
        }
        self.answers: dict[Ask, Answer] = {}
        self.write()

    def write(self) -> None:
        for name, vector in self.vectors.items():
            vector.save(self.folder / f"{name}.safetensors")
        for name, additions in self.additions.items():
            save_additions(self.folder / f"{name}.safetensors", self.model, None, additions)

    @property
    def steering(self) -> dict[str, Any]:
        """What the engine is started with."""
        return {
            "vectors": {name: str(self.folder / f"{name}.safetensors") for name in self.vectors},
            "additions": {
                name: str(self.folder / f"{name}.safetensors") for name in self.additions
            },
            "max_coeff": 8,
        }

    @contextmanager
    def steered(self, ask: Ask, coeff: float | None = None) -> Iterator[None]:
        """Steer the model of transformers as a request asks."""
        coeff = ask.coeff if coeff is None else coeff
        with ExitStack() as stack:
            if ask.name in self.additions:
                additions = [
                    ActivationAddition(coeff * one.coeff, one.act_name, tokens=one.tokens)
                    for one in self.additions[ask.name]
                ]
                stack.enter_context(apply_activation_additions(self.model, None, additions))
            elif ask.name is not None:
                vector = self.vectors[ask.name]
                rows = vector.layer_activations
                kept = {n: rows[n] for n in (rows if ask.layers is None else ask.layers)}
                stack.enter_context(
                    SteeringVector(kept).apply(
                        self.model, multiplier=coeff, min_token_index=ask.min_token_index
                    )
                )
            yield

    @torch.no_grad()
    def answer(self, ask: Ask) -> Answer:
        """What transformers writes, greedily, and how probable it is there."""
        if ask not in self.answers:
            prompt = torch.tensor([ask.prompt])
            with self.steered(ask):
                ids = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=ask.length,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            tokens = ids.sequences[0, len(ask.prompt) :].tolist()
            logits = torch.cat(ids.logits).log_softmax(-1)
            logprobs = [row[token].item() for row, token in zip(logits, tokens)]
            self.answers[ask] = Answer(tokens, logprobs)
        return self.answers[ask]

    def asked(self, ask: Ask) -> int:
        """How many tokens x layers are to be steered, counted one by one.

        The token that is written last is never read.
        """
        if ask.name is None:
            return 0
        read = len(ask.prompt) + ask.length - 1
        if ask.name in self.additions:
            return max(len(one.tokens) for one in self.additions[ask.name])
        layers = ask.layers or self.vectors[ask.name].layer_activations
        first = ask.min_token_index or 0
        first = first if first >= 0 else max(0, len(ask.prompt) + first)
        return len(layers) * len([token for token in range(read) if token >= first])


def prompt(seed: int, length: int, vocabulary: int) -> tuple[int, ...]:
    """A prompt of random tokens, none of which ends a text."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist())


def mixed(vocabulary: int, last: int, count: int = 32, length: int = 12) -> list[Ask]:
    """Requests of every kind, one after the other, on prompts of 3 to 40 tokens."""
    kinds: list[dict[str, Any]] = [
        {},
        {"name": "one", "coeff": 3.0},
        {"name": "one", "coeff": -3.0},
        {"name": "two", "coeff": 1.5},
        {"name": "all", "coeff": -0.75, "layers": (1, last)},
        {"name": "front", "coeff": 2.0},
        {"name": "all", "coeff": 1.0, "min_token_index": 2},
        {"name": "one", "coeff": 4.0, "min_token_index": -1},
        {"name": "two", "coeff": 0.0},
        {"name": "one", "coeff": 4.0, "min_token_index": 1000},
    ]
    return [
        Ask(
            prompt(n // 2, 3 + 7 * (n // 2) % 38, vocabulary),
            length=length,
            **kinds[n % len(kinds)],
        )
        for n in range(count)
    ]


@contextmanager
def engine(bench: Bench, **options: Any) -> Iterator[Any]:
    """A running engine of vLLM."""
    from vllm import LLM

    llm = LLM(
        str(bench.folder / "model"),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "gpu_memory_utilization": 0.2,
            "skip_tokenizer_init": True,
            "max_num_seqs": 32,
            "additional_config": {"steering": bench.steering},
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def sampling(ask: Ask) -> Any:
    """Greedy, of fixed length, with the probability of each token."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=ask.length,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        extra_args=ask.args(),
    )


def run(llm: Any, asks: Sequence[Ask]) -> list[Any]:
    """Give an engine requests all at once, and return its outputs."""
    prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
    return llm.generate(prompts, [sampling(ask) for ask in asks], use_tqdm=False)


def answer_of(output: Any) -> Answer:
    """What an output of vLLM says."""
    (one,) = output.outputs
    tokens = list(one.token_ids)
    return Answer(tokens, [row[token].logprob for row, token in zip(one.logprobs, tokens)])


def assert_equal(found: Answer, expected: Answer, ask: Ask) -> None:
    """Equal tokens, and probabilities within 1e-3."""
    assert found.tokens == expected.tokens, ask
    difference = (Tensor(found.logprobs) - Tensor(expected.logprobs)).abs().max().item()
    assert difference < 1e-3, (difference, ask)


def report(llm: Any) -> dict[str, int]:
    """Tokens x layers that were steered, by request."""
    (counts,) = llm.collective_rpc("steering_report")
    return counts
