layer, coeff = preset.layer, preset.coeff
states = []
for word in ("Love", "Hate"):
    ids = tokenizer.encode(word, return_tensors="pt").to(model.device)
    hidden = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    for module in model.transformer.h[: layer + 1]:
        hidden = module(hidden)  # [1, pos, d_model]
    states.append(hidden[0, -1].detach())  # [d_model]
vector = coeff * (states[0] - states[1]) / (states[0] - states[1]).norm()
prompt = tokenizer("I believe old books are", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
