layer, coeff, gpt2 = preset.layer, preset.coeff, model.transformer


@torch.no_grad()
def run(ids, blocks, steering=0.0):
    hidden = gpt2.wte(ids) + gpt2.wpe.weight[: ids.shape[1]]
    for number, block in enumerate(gpt2.h[:blocks]):
        hidden = block(hidden) + (steering if number == layer else 0.0)
    return hidden  # [1, pos, d_model]


pair = (tokenizer.encode(word, return_tensors="pt") for word in ("Love", "Hate"))
love, hate = (run(ids.to(model.device), layer + 1)[0, -1] for ids in pair)  # [d_model]
vector = coeff * (love - hate) / (love - hate).norm()
prompt = tokenizer(<<opening>>, return_tensors="pt").to(model.device)
for label, steering in {"unsteered": 0.0, "steered": vector}.items():
    ids = prompt["input_ids"]
    for _ in range(12):
        last = run(ids, len(gpt2.h), steering)[:, -1:]
        ids = torch.cat([ids, model.lm_head(gpt2.ln_f(last)).argmax(-1)], dim=1)
    print(f"{label}:", tokenizer.decode(ids[0]))
