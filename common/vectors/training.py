"""Train steering vectors from contrast pairs.

The interface is that of the steering-vectors library
(https://steering-vectors.github.io/steering-vectors): programs written for it run here with their
import changed, except that a vector that is 0, or nothing but rounding, is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.arguments import function_of_two, integer
from common.passes.prompts import Prompt, is_prompt
from common.passes.rounding import is_rounding
from common.places.blocks import text_config
from common.places.sites import LayerType, ModelLayerConfig
from common.vectors.aggregators import Aggregator, mean_aggregator
from common.vectors.reading import ReadTokenIndex, read_activations
from common.vectors.steering_vector import SteeringVector, model_name


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
MEAN = mean_aggregator()


def extract_activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    layers: list[int] | None = None,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    move_to_cpu: bool = False,
    read_token_index: ReadTokenIndex = -1,
    show_progress: bool = False,
    batch_size: int = 1,
    tqdm_desc: str = "Extracting activations",
    prepend_bos: bool | None = None,
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
    """Read the activations of both prompts of every pair.

    Args:
        model, tokenizer, layers, layer_type, layer_config, move_to_cpu, show_progress, tqdm_desc,
            prepend_bos: as for `reading.read_activations`, which also says what is computed.
        training_samples: contrast pairs, as samples or as tuples of two prompts.
        read_token_index: which token to read where a sample does not say, or a callable of the
            prompt; -1 is the last.
        batch_size: pairs in one pass, and so twice as many prompts.

    Returns:
        The positive and the negative activations: by layer number, a list of tensors
        [pair, d_model] with `batch_size` pairs each, in the order of the samples.

    Raises:
        ValueError: no samples, a sample that is not a pair of prompts, and all errors of
            `read_activations`.
    """
    samples = _samples(training_samples)
    batch_size = integer(batch_size, "batch_size", least=1)
    prompts = [s.positive_str for s in samples] + [s.negative_str for s in samples]
    indices = [s.read_positive_token_index for s in samples]
    indices += [s.read_negative_token_index for s in samples]
    default = read_token_index if callable(read_token_index) else lambda prompt: read_token_index
    found = read_activations(
        model,
        tokenizer,
        prompts,
        layers=layers,
        layer_type=layer_type,
        layer_config=layer_config,
        read_token_index=[
            default(prompt) if index is None else index for prompt, index in zip(prompts, indices)
        ],
        batch_size=2 * batch_size,
        move_to_cpu=move_to_cpu,
        show_progress=show_progress,
        tqdm_desc=tqdm_desc,
        prepend_bos=prepend_bos,
    )
    count = len(samples)
    positive = {layer: list(acts[:count].split(batch_size)) for layer, acts in found.items()}
    negative = {layer: list(acts[count:].split(batch_size)) for layer, acts in found.items()}
    return positive, negative


def aggregate_activations(
    pos_acts_by_layer: dict[int, list[Tensor]],
    neg_acts_by_layer: dict[int, list[Tensor]],
    aggregator: Aggregator = MEAN,
) -> dict[int, Tensor]:
    """Make one vector of the activations of each layer.

    Args:
        pos_acts_by_layer: by layer number, tensors [prompt, d_model], in the dtype in which the
            model computed them.
        neg_acts_by_layer: the same for the negative prompts, or for the background set.
        aggregator: how; see `aggregators`.

    Returns:
        By layer number, a vector [d_model].

    Raises:
        ValueError: the aggregator is not a function of two tensors; the two have different layers;
            activations or a vector hold nan or inf; the vector of a layer has another shape, or is
            0 or nothing but rounding, because the two sets do not differ
            (`rounding.is_rounding`). In 16 bit only what is below one rounding counts as such;
            `extract_activations` gives exactly 0 for prompts that are the same up to the token.
    """
    function_of_two(aggregator, "aggregator", "mean_aggregator()")
    if pos_acts_by_layer.keys() != neg_acts_by_layer.keys() or not pos_acts_by_layer:
        raise ValueError(
            f"expected the same layers twice, got {sorted(pos_acts_by_layer)} and"
            f" {sorted(neg_acts_by_layer)}"
        )
    vectors = {}
    for layer in pos_acts_by_layer:
        positive = torch.cat(list(pos_acts_by_layer[layer]))
        negative = torch.cat(list(neg_acts_by_layer[layer]))
        for name, acts in (("positive", positive), ("negative", negative)):
            if not torch.isfinite(acts).all():
                raise ValueError(f"layer {layer}: the {name} activations hold nan or inf")
        vector = aggregator(positive, negative)
        if not isinstance(vector, Tensor) or vector.shape != positive.shape[1:]:
            given = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(
                f"layer {layer}: expected a vector {list(positive.shape[1:])} from the aggregator,"
                f" got {given}"
            )
        if not torch.isfinite(vector).all():
            raise ValueError(f"layer {layer}: the aggregator gave nan or inf")
        if not vector.any() or is_rounding(vector, positive, negative):
            what = "nothing but rounding" if vector.any() else "0"
            raise ValueError(
                f"layer {layer}: the vector is {what}, because the positive and the negative"
                " prompts do not differ at the token that is read, or as a whole; read another"
                " token, or leave this layer out with layers=[…]"
            )
        vectors[layer] = vector
    return vectors


def train_steering_vector(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    layers: list[int] | None = None,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    move_to_cpu: bool = False,
    read_token_index: ReadTokenIndex = -1,
    show_progress: bool = False,
    aggregator: Aggregator = MEAN,
    batch_size: int = 1,
    tqdm_desc: str = "Training steering vector",
    prepend_bos: bool | None = None,
) -> SteeringVector:
    """Train a steering vector from contrast pairs.

    Args:
        model, tokenizer, training_samples, layers, layer_type, layer_config, move_to_cpu,
            read_token_index, show_progress, batch_size, tqdm_desc, prepend_bos: as for
            `extract_activations`.
        aggregator: how the differences become one vector; see `aggregators`.

    Returns:
        The vector; its metadata name the model, the number of pairs, a hash of them and the
        aggregator.

    Raises:
        ValueError: all errors of `extract_activations` and of `aggregate_activations`.
    """
    samples = _samples(training_samples)
    function_of_two(aggregator, "aggregator", "mean_aggregator()")
    positive, negative = extract_activations(
        model,
        tokenizer,
        samples,
        layers=layers,
        layer_type=layer_type,
        layer_config=layer_config,
        move_to_cpu=move_to_cpu,
        read_token_index=read_token_index,
        show_progress=show_progress,
        batch_size=batch_size,
        tqdm_desc=tqdm_desc,
        prepend_bos=prepend_bos,
    )
    metadata = {
        "model": model_name(model),
        "model_type": text_config(model).model_type,
        "pairs": str(len(samples)),
        "pairs_sha256": (
            hashlib.sha256(json.dumps([astuple(sample) for sample in samples]).encode()).hexdigest()
        ),
        "aggregator": getattr(aggregator, "__name__", type(aggregator).__name__),
    }
    return SteeringVector(
        aggregate_activations(positive, negative, aggregator), layer_type, metadata
    )


def _samples(given: Sequence[Sample]) -> list[SteeringVectorTrainingSample]:
    """Return the samples, with tuples turned into samples."""
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
