"""What the notebooks share, and what a reader takes home. Each module imports only from the floors below it.

6  love_hate figures                   the experiment through any mechanism; figures a model must show
5  mechanisms sweeps                   the notebooks' own cells as callables; layers x coefficients x prompts in one batch
4  training comparisons rating         steering vectors from contrast pairs; completions side by side, rated blind
4  corpus probabilities effects        perplexity on and off the topic; the next token; where steering works
4  row_steering                        each row of a batch steered by a vector of its own
4  checks                              what is wrong with a steering, the reader's own included; one place in all vocabularies
3  steering_vector generation metrics  apply, save and load a vector; sampling and logits; what is measured on texts
4  demonstrations                      the four famous ones: prompts, places, coefficients
3  activation_additions                the activations of one prompt at the front of another
2  activations pristine hooking        read and record; is this model as it was? hooks and their order
2  passes                              the device of the inputs, evaluation mode, which rows may share a batch
1  models embedded baukit_standin      load; the model that comes with the project; a Trace where baukit is missing
1  blocks sites positions              find a block, and a part of it, in any model; which tokens of a text
1  rounding arguments                  what rounding leaves of a difference; what is asked of arguments
1  operators aggregators               what is done at a position; how many differences become one vector
1  prompts pictures                    from prompts to token ids; pictures that several notebooks draw
1  sweep_store identity                the rows of a sweep in a file, and what they depend on
1  progress                            bars that leave nothing behind, in a terminal or a notebook

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
        "checks": [
            "assert_adds", "assert_beats_random", "assert_bos", "assert_leaves_generated_tokens", "assert_no_top_k",
            "assert_precise_difference", "assert_same_length", "assert_same_place", "assert_steers_every_row",
            "assert_steers_generated_tokens", "precision_of_difference", "translate", "where_is",
        ],
        "comparisons": [
            "complete", "gen_normal_and_modified", "gen_using_activation_additions", "pretty_print_completions", "print_n_comparisons",
        ],
        "corpus": ["get_stats_over_corpus", "perplexity_ratios", "plot_perplexity_ratios"],
        "effects": ["effect_by_cell", "perplexity_ratio_by_cell", "plot_effect", "plot_heat_map", "plot_prompts", "working_window"],
        "metrics": [
            "add_metric_cols", "get_logprob_metric", "get_loss_metric", "get_sentiment_metric", "get_word_count_metric",
        ],
        "models": ["load_model"],
        "operators": [
            "PatchDeltaOperator", "ablation_operator", "ablation_then_addition_operator", "addition_operator",
            "norm_preserving_addition_operator",
        ],
        "prompts": ["prompt_ids", "prompt_text"],
        "pristine": ["assert_pristine", "snapshot"],
        "probabilities": [
            "effectiveness_and_disruption", "next_token_probs", "plot_effectiveness_and_disruption", "plot_top_changed_tokens",
            "top_changed_tokens",
        ],
        "sites": ["LayerMatcher", "LayerType", "ModelLayerConfig", "get_num_matching_layers", "guess_and_enhance_layer_config"],
        "sweep_store": ["read_sweep"],
        "sweeps": ["sweep", "sweep_logits", "sweep_perplexity", "token_logprob"],
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
