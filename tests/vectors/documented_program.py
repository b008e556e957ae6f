"""A program for the steering-vectors library; test_training changes only its import."""

import sys

import torch
from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    aggregate_activations,
    extract_activations,
    get_num_matching_layers,
    guess_and_enhance_layer_config,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    record_activations,
    train_steering_vector,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = {
    "decoder_block": "transformer.h.{num}",
    "self_attn": "transformer.h.{num}.attn",
    "mlp": "transformer.h.{num}.mlp",
    "input_layernorm": "transformer.h.{num}.ln_1",
    "post_attention_layernorm": "transformer.h.{num}.ln_2",
}
assert guess_and_enhance_layer_config(model) == config
count = get_num_matching_layers(model, config["mlp"])

samples = [
    SteeringVectorTrainingSample(
        positive_str="I love the garden", negative_str="I hate the garden"
    ),
    SteeringVectorTrainingSample(
        "We adore you", "We despise you", read_positive_token_index=1, read_negative_token_index=1
    ),
    ("The soup is delicious", "The soup is rotten"),
]
vector = train_steering_vector(
    model,
    tokenizer,
    samples,
    layers=[1, 2, -1],
    layer_type="decoder_block",
    layer_config=config,
    move_to_cpu=True,
    read_token_index=-1,
    show_progress=False,
    aggregator=mean_aggregator(),
    batch_size=2,
    tqdm_desc="Training",
)
assert (
    sorted(vector.layer_activations) == [1, 2, count - 1] and vector.layer_type == "decoder_block"
)
for aggregator in (pca_aggregator(), logistic_aggregator({"C": 0.5})):
    other = train_steering_vector(model, tokenizer, samples, layers=[2], aggregator=aggregator)
    assert abs(other.layer_activations[2].norm().item() - 1) < 1e-4

pos_acts, neg_acts = extract_activations(model, tokenizer, samples, layers=[2], batch_size=2)
d_model = model.config.hidden_size
assert [list(part.shape) for part in pos_acts[2]] == [[2, d_model], [1, d_model]]
by_hand = SteeringVector(
    aggregate_activations(pos_acts, neg_acts, lambda p, n: (p - n).mean(0)), "decoder_block"
)
assert torch.allclose(by_hand.layer_activations[2], vector.layer_activations[2], atol=1e-4)

inputs = tokenizer("I think you are", return_tensors="pt")
with torch.no_grad():
    plain = model(**inputs).logits
    with vector.apply(
        model, layer_config=config, operator=addition_operator(), multiplier=2.0, min_token_index=1
    ):
        steered = model(**inputs).logits
    assert torch.allclose(steered[:, 0], plain[:, 0], atol=1e-4) and not torch.allclose(
        steered, plain, atol=1e-2
    )
    for operator in (
        ablation_operator(),
        ablation_then_addition_operator(),
        lambda hidden, v: -0.5 * v,
    ):
        with by_hand.apply(model, operator=operator):
            model(**inputs)
    handle = by_hand.to(dtype=torch.float32).patch_activations(model, token_indices=[0, 1])
    with record_activations(
        model, layer_type="mlp", layer_nums=[3], clone_activations=True
    ) as recorded:
        model(**inputs)
    handle.remove()
    assert list(recorded) == [3] and recorded[3][0].shape == (1, 4, d_model)
    assert torch.allclose(model(**inputs).logits, plain)
print(
    "norms",
    " ".join(
        f"{layer}:{found.norm():.3f}" for layer, found in sorted(vector.layer_activations.items())
    ),
)
