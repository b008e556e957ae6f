"""Train steering vectors from contrast pairs.

The interface is that of the steering-vectors library
(https://steering-vectors.github.io/steering-vectors): programs written for it run here with their
import changed, except that a vector that is 0, or nothing but rounding, is refused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.arguments import function_of_two, integer
from common.passes.rounding import Spread, is_rounding, spread_of
from common.passes.running import input_device
from common.places.blocks import text_config
from common.places.sites import LayerType, ModelLayerConfig
from common.progress import progress_bar
from common.scaling.units import Engine
from common.vectors.aggregators import Aggregator, Moments, SummingAggregator, mean_aggregator
from common.vectors.pairs import PairReading, Sample, hash_of_pairs, moments_on, read_on, samples_of
from common.vectors.reading import ReadTokenIndex
from common.vectors.steering_vector import SteeringVector, model_name

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
    engine: Engine | None = None,
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
    """Read the activations of both prompts of every pair.

    Args:
        model, tokenizer, layers, layer_type, layer_config: as for `reading.read_activations`, which
            also says what is computed.
        move_to_cpu, show_progress, tqdm_desc, prepend_bos: as for the same.
        training_samples: contrast pairs, as samples or as tuples of two prompts.
        read_token_index: which token to read where a sample does not say, or a callable of the
            prompt; -1 is the last.
        batch_size: pairs in one pass, and so twice as many prompts.
        engine: workers that read the pairs (`RayEngine`), in blocks; without it, this process reads
            them. The activations are the same but for rounding, and to the last bit for any number
            of workers. Those of an engine with `parts` are kept there.

    Returns:
        The positive and the negative activations: by layer number, a list of tensors
        [pair, d_model] with `batch_size` pairs each, in the order of the samples.

    Raises:
        ValueError: no samples, a sample that is not a pair of prompts, and all errors of
            `read_activations`.
    """
    samples = samples_of(training_samples)
    batch_size = integer(batch_size, "batch_size", least=1)
    reading = PairReading(
        layers, layer_type, layer_config, read_token_index, batch_size, prepend_bos
    )
    if engine is None:
        options = {"move_to_cpu": move_to_cpu, "show_progress": show_progress}
        both = reading.read(model, tokenizer, samples, tqdm_desc=tqdm_desc, **options)
    else:
        device = "cpu" if move_to_cpu else input_device(model)
        with progress_bar(len(samples), tqdm_desc, "pair", show_progress) as bar:
            both = read_on(engine, model, tokenizer, samples, reading, bar)
        both = [{layer: acts.to(device) for layer, acts in side.items()} for side in both]
    positive, negative = (
        {layer: list(acts.split(batch_size)) for layer, acts in side.items()} for side in both
    )
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
        _refuse_rounding(layer, vector, spread_of(positive, negative))
        vectors[layer] = vector
    return vectors


def _refuse_rounding(layer: int, vector: Tensor, spread: Spread) -> None:
    """Refuse a vector that means nothing."""
    if not vector.any() or is_rounding(vector, spread):
        what = "nothing but rounding" if vector.any() else "0"
        raise ValueError(
            f"layer {layer}: the vector is {what}, because the positive and the negative prompts do"
            " not differ at the token that is read, or as a whole; read another token, or leave"
            " this layer out with layers=[…]"
        )


def _of_moments(layer: int, moments: Moments, aggregator: SummingAggregator) -> Tensor:
    """The vector of a layer from sums over its pairs, as `aggregate_activations` makes it."""
    for name, sums in zip(("positive", "negative"), moments.spread.sums):
        if not torch.isfinite(sums).all():
            raise ValueError(f"layer {layer}: the {name} activations hold nan or inf")
    vector = aggregator.of_moments(moments)
    _refuse_rounding(layer, vector, moments.spread)
    return vector


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
    engine: Engine | None = None,
) -> SteeringVector:
    """Train a steering vector from contrast pairs.

    Args:
        model, tokenizer, training_samples, layers, layer_type, layer_config, move_to_cpu,
            read_token_index, show_progress, batch_size, tqdm_desc, prepend_bos, engine: as for
            `extract_activations`. For the mean and for PCA the workers of an engine send sums, in
            float64, and no activations.
        aggregator: how the differences become one vector; see `aggregators`.

    Returns:
        The vector; its metadata name the model, the number of pairs, a hash of them and the
        aggregator.

    Raises:
        ValueError: all errors of `extract_activations` and of `aggregate_activations`.
    """
    samples = samples_of(training_samples)
    function_of_two(aggregator, "aggregator", "mean_aggregator()")
    if engine is not None and isinstance(aggregator, SummingAggregator):
        batch_size = integer(batch_size, "batch_size", least=1)
        reading = PairReading(
            layers, layer_type, layer_config, read_token_index, batch_size, prepend_bos
        )
        device = "cpu" if move_to_cpu else input_device(model)
        with progress_bar(len(samples), tqdm_desc, "pair", show_progress) as bar:
            found = moments_on(engine, model, tokenizer, samples, reading, aggregator.gram, bar)
        vectors = {
            layer: _of_moments(layer, moments, aggregator).to(device)
            for layer, moments in found.items()
        }
    else:
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
            engine=engine,
        )
        vectors = aggregate_activations(positive, negative, aggregator)
    metadata = {
        "model": model_name(model),
        "model_type": text_config(model).model_type,
        "pairs": str(len(samples)),
        "pairs_sha256": hash_of_pairs(samples),
        "aggregator": getattr(aggregator, "__name__", type(aggregator).__name__),
    }
    return SteeringVector(vectors, layer_type, metadata)
