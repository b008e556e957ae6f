"""What the notebooks share, and what a reader takes home. Each module imports only from the floors below it.

6  love_hate figures sweeps            the experiment through any mechanism; figures a model must show; grids
5  mechanisms                          the notebooks' own cells as callables
4  training comparisons                steering vectors from contrast pairs; completions side by side
3  steering_vector generation metrics  apply, save and load a vector; sampling and logits; the tone of a text
3  activation_additions                the activations of one prompt at the front of another
2  activations pristine hooking        read and record; is this model as it was? hooks and their order
1  models embedded baukit_standin      load; the model that comes with the project; a Trace where baukit is missing
1  blocks sites positions              find a block, and a part of it, in any model; which tokens of a text
1  operators aggregators               what is done at a position; how many differences become one vector
1  pictures                            pictures that several notebooks draw

Beside the floors stand commands that nobody imports from below: `notebooks` runs the notebooks and stores their outputs,
`colab` writes their badge and first cell, `embedded.train`, `embedded.sweep` and `embedded.evaluate` make and measure the
embedded model.

The names of `__all__` can be imported from here; their modules are loaded when one is asked for, and not before.
"""

import importlib

_MODULE_OF = {
    name: module
    for module, names in {
        "activation_additions": [
            "ActivationAddition", "addition_vectors", "apply_activation_additions", "get_x_vector", "line_up", "with_bos",
        ],
        "activations": ["read_activations", "record_activations"],
        "aggregators": ["Aggregator", "logistic_aggregator", "mean_aggregator", "mean_centred_aggregator", "pca_aggregator"],
        "comparisons": [
            "complete", "gen_normal_and_modified", "gen_using_activation_additions", "pretty_print_completions", "print_n_comparisons",
        ],
        "models": ["load_model"],
        "operators": [
            "PatchDeltaOperator", "ablation_operator", "ablation_then_addition_operator", "addition_operator",
            "norm_preserving_addition_operator",
        ],
        "pristine": ["assert_pristine", "snapshot"],
        "sites": ["LayerMatcher", "LayerType", "ModelLayerConfig", "get_num_matching_layers", "guess_and_enhance_layer_config"],
        "steering_vector": ["SteeringPatchHandle", "SteeringVector"],
        "training": ["SteeringVectorTrainingSample", "aggregate_activations", "extract_activations", "train_steering_vector"],
    }.items()
    for name in names
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Load the module behind a name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """The names that can be imported from here."""
    return [*globals(), *__all__]
