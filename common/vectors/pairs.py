"""Contrast pairs and their activations, read here or by the workers of an engine."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from typing import Any, cast
from uuid import uuid4

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.identity import identity_of_metric
from common.passes.hooks import check_engine, refuse_hooks
from common.passes.prompts import Prompt, is_prompt
from common.places.sites import LayerType, ModelLayerConfig, get_layers
from common.scaling.ray_engine import identity_here
from common.scaling.units import Engine, Job, Unit, Work, in_order, run_units
from common.tensor_parallel import of_the_first
from common.vectors.aggregators import Moments, moments_of
from common.vectors.reading import ReadTokenIndex, read_activations

PAIRS = 256  # that a worker reads at a time, about
ByLayer = dict[int, Tensor]


@dataclass
class SteeringVectorTrainingSample:
    """A contrast pair: two prompts that differ in what the vector is to mean.

    Attributes:
        positive_str: the positive prompt: a text, or messages (`[{"role": "user", "content":
            "Hi"}]`) for a chat model.
        negative_str: the negative prompt.
        read_positive_token_index: which token of the positive prompt is read; `read_token_index`
            where it is None.
        read_negative_token_index: the same for the negative prompt.
    """

    positive_str: Prompt
    negative_str: Prompt
    read_positive_token_index: int | None = None
    read_negative_token_index: int | None = None


Sample = SteeringVectorTrainingSample | tuple[Prompt, Prompt]


def samples_of(given: Sequence[Sample]) -> list[SteeringVectorTrainingSample]:
    """Return contrast pairs, with tuples turned into samples.

    Raises:
        ValueError: no pairs, or something that is not a pair of prompts.
    """
    if isinstance(given, str) or not len(given):
        raise ValueError(f"expected a list of contrast pairs, got {given!r}")
    samples = []
    for number, sample in enumerate(given):
        if not isinstance(sample, SteeringVectorTrainingSample):
            if not isinstance(sample, tuple | list) or len(sample) != 2:
                raise ValueError(
                    f"pair {number}: expected (positive_str, negative_str), got {sample!r}"
                )
            sample = SteeringVectorTrainingSample(*sample)
        if not is_prompt(sample.positive_str) or not is_prompt(sample.negative_str):
            raise ValueError(
                f"pair {number}: expected two texts or lists of messages, got {sample!r}"
            )
        samples.append(sample)
    return samples


def hash_of_pairs(samples: Sequence[SteeringVectorTrainingSample], *more: Any) -> str:
    """Return a hash of pairs and of what is read of them, and of more that JSON can hold."""
    content: list[Any] = [astuple(sample) for sample in samples]
    content = [*more, content] if more else content
    # Numbers of numpy are integers, too.
    return hashlib.sha256(json.dumps(content, default=int).encode()).hexdigest()


@dataclass(frozen=True)
class PairReading:
    """Which activations of pairs are read, and in which batches; see `extract_activations`."""

    layers: list[int] | None
    layer_type: LayerType
    layer_config: ModelLayerConfig | None
    read_token_index: ReadTokenIndex
    batch_size: int
    prepend_bos: bool | None

    def read(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[SteeringVectorTrainingSample],
        **options: Any,
    ) -> tuple[ByLayer, ByLayer]:
        """Return the positive and the negative activations, by layer number [pair, d_model].

        `options` are more of `read_activations`.
        """
        samples = self.pointed(samples)
        prompts = [s.positive_str for s in samples] + [s.negative_str for s in samples]
        indices = [s.read_positive_token_index for s in samples]
        indices += [s.read_negative_token_index for s in samples]
        found = read_activations(
            model,
            tokenizer,
            prompts,
            layers=self.layers,
            layer_type=self.layer_type,
            layer_config=self.layer_config,
            read_token_index=cast(list[int], indices),
            batch_size=2 * self.batch_size,
            prepend_bos=self.prepend_bos,
            **options,
        )
        count = len(samples)
        return (
            {layer: acts[:count] for layer, acts in found.items()},
            {layer: acts[count:] for layer, acts in found.items()},
        )

    def pointed(
        self, samples: Sequence[SteeringVectorTrainingSample]
    ) -> list[SteeringVectorTrainingSample]:
        """Return samples that say themselves which tokens are read."""
        index = self.read_token_index

        def of(own: int | None, prompt: Prompt) -> int:
            if own is not None:
                return own
            return index(prompt) if callable(index) else index

        positive = [of(s.read_positive_token_index, s.positive_str) for s in samples]
        negative = [of(s.read_negative_token_index, s.negative_str) for s in samples]
        return [
            replace(s, read_positive_token_index=one, read_negative_token_index=other)
            for s, one, other in zip(samples, positive, negative)
        ]


@dataclass(frozen=True)
class _Extracting(Job[Any]):
    """Reads pairs on an engine: sums over them, or the activations themselves.

    Args:
        samples: the pairs, which say what is read of them.
        reading: how.
        gram: whether the sums include the Gram matrix; None for the activations instead of sums.
        parts: where activations are written; None sends them.
        identity: of everything else that they depend on.
    """

    samples: Sequence[SteeringVectorTrainingSample]
    reading: PairReading
    gram: bool | None = None
    parts: str | None = None
    identity: str = ""

    def units(self) -> list[Unit]:
        """Cut the pairs into blocks of whole batches."""
        size = max(1, PAIRS // self.reading.batch_size) * self.reading.batch_size
        numbers = range(len(self.samples))
        return [Unit(tuple(numbers[start : start + size])) for start in numbers[::size]]

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Work[Any]:
        """Return what reads a block of pairs."""
        refuse_hooks(model, "reading on an engine")

        def work(unit: Unit) -> Any:
            # Processes that share a model also share the answer: all of them compute, or none.
            if self.parts is not None and of_the_first(
                model, lambda: _part_exists(self._part(unit))
            ):
                return self._part(unit)
            samples = [self.samples[number] for number in unit.numbers]
            both = self.reading.read(model, tokenizer, samples, move_to_cpu=True)
            if self.gram is not None:
                return {
                    layer: moments_of(acts, both[1][layer], self.gram)
                    for layer, acts in both[0].items()
                }
            if self.parts is None:
                return both
            of_the_first(model, lambda: _write_part(self._part(unit), both))
            return self._part(unit)

        return work

    def describe(self, number: int) -> str:
        """Say which pair a number is."""
        return f"pair {number}: {self.samples[number]!r}"

    def _part(self, unit: Unit) -> str:
        """The address of a unit's activations, made of all that could change them."""
        name = hash_of_pairs([self.samples[number] for number in unit.numbers], self.identity)
        return f"{str(self.parts).rstrip('/')}/{name}.safetensors"


def read_on(
    engine: Engine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[SteeringVectorTrainingSample],
    reading: PairReading,
    bar: tqdm,
) -> tuple[ByLayer, ByLayer]:
    """Return the activations of pairs as `PairReading.read` does, on the CPU, read by workers."""
    job = _job(engine, samples, reading, model)
    if engine.parts is not None:
        identity = _identity(cast(PreTrainedModel, model), tokenizer, job.reading)
        job = replace(job, parts=engine.parts, identity=identity)
    found: list[tuple[ByLayer, ByLayer]] = []
    with closing(run_units(engine, cast(Any, model), tokenizer, job, job.units(), bar)) as units:
        for _, result in in_order(units):
            found.append(_read_part(result) if isinstance(result, str) else result)
    positive, negative = (
        {layer: torch.cat([part[side][layer] for part in found]) for layer in found[0][side]}
        for side in (0, 1)
    )
    return positive, negative


def moments_on(
    engine: Engine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[SteeringVectorTrainingSample],
    reading: PairReading,
    gram: bool,
    bar: tqdm,
) -> dict[int, Moments]:
    """Return sums over pairs by layer, added in the order of the pairs, whoever read them when."""
    job, total = replace(_job(engine, samples, reading, model), gram=gram), dict[int, Moments]()
    with closing(run_units(engine, cast(Any, model), tokenizer, job, job.units(), bar)) as units:
        for _, moments in in_order(units):
            for layer, part in moments.items():
                total[layer] = total[layer].plus(part) if layer in total else part
    return total


def _job(
    engine: Engine,
    samples: Sequence[SteeringVectorTrainingSample],
    reading: PairReading,
    model: nn.Module,
) -> _Extracting:
    check_engine(engine, model)
    found = get_layers(model, reading.layer_type, reading.layer_config, reading.layers)
    # Callables stay here: what they say of each prompt goes to the workers.
    layers = list(map(int, found))
    how = replace(reading, layers=layers, read_token_index=-1)
    return _Extracting(reading.pointed(samples), how)


def _identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reading: PairReading
) -> str:
    """What the activations of a pair depend on, beside the pair."""
    how = [reading.layers, reading.layer_type, reading.batch_size, reading.prepend_bos]
    matchers = identity_of_metric(reading.layer_config, "layer_config")
    return json.dumps([identity_here(model, tokenizer), how, matchers], sort_keys=True)


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    import fsspec  # only where parts are written

    return fsspec.core.url_to_fs(address)


def _part_exists(address: str) -> bool:
    files, path = _file_system(address)
    return files.exists(path)


def _write_part(address: str, both: tuple[ByLayer, ByLayer]) -> None:
    """Write activations beside their place, and move them there when they are complete."""
    files, path = _file_system(address)
    tensors = {
        f"{side} {layer}": acts.contiguous()
        for side, by_layer in zip(("positive", "negative"), both)
        for layer, acts in by_layer.items()
    }
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    beside = f"{path}.{uuid4().hex}"
    with files.open(beside, "wb") as file:
        file.write(save(tensors))
    files.mv(beside, path)


def _read_part(address: str) -> tuple[ByLayer, ByLayer]:
    files, path = _file_system(address)
    with files.open(path, "rb") as file:
        tensors = load(file.read())
    positive, negative = (
        {
            int(name.split()[1]): acts
            for name, acts in sorted(tensors.items(), key=lambda item: int(item[0].split()[1]))
            if name.startswith(side)
        }
        for side in ("positive", "negative")
    )
    return positive, negative
