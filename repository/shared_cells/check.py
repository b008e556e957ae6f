reference = load_mechanism("<<reference>>")
other = reference.wrap(copy_sharing_weights(model), tokenizer)
real, gap = inputs["attention_mask"].bool(), 0.0
for vector in (coeff * direction, -coeff * direction):
    with steer(wrapped, layer, vector), reference.steer(other, layer, vector):
        difference = logits(wrapped, inputs) - reference.logits(other, inputs)
        assert torch.equal(generate(wrapped, inputs), reference.generate(other, inputs))
    gap = max(gap, difference[real].abs().max().item())
assert gap <= <<tolerance>>
try:
    with steer(wrapped, layer, vector):
        raise RuntimeError("an error while steering")
except RuntimeError as error:
    print("raised and caught:", error)
assert_pristine(wrapped, before)
assert torch.equal(read(wrapped, inputs, layer), unsteered_hidden)
print(f"largest difference of a logit to {reference.name}: {gap:.4f}")
print("greedy texts the same, model restored")
