prompts = [
<<prompts>>
]
inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
vector = coeff * direction  # [d_model]
unsteered_hidden = read(wrapped, inputs, layer)  # [batch, pos, d_model]
with steer(wrapped, layer, vector):
    moved = read(wrapped, inputs, layer) - unsteered_hidden  # [batch, pos, d_model]
torch.testing.assert_close(moved, vector.expand_as(moved), rtol=0, atol=1e-4)
print(f"{moved.shape[0]} rows of {moved.shape[1]} positions moved by the vector")
usual = unsteered_hidden[inputs["attention_mask"].bool()].norm(dim=-1).median()
print(f"its norm is {coeff:g}; that of the hidden states is about {usual:.0f}")
