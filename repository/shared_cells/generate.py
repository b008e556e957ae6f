many = tokenizer(20 * prompts, return_tensors="pt", padding=True).to(model.device)
greedy, tones = {}, {}


def write(label):
    ids = generate(wrapped, inputs, max_new_tokens=40)
    greedy[label] = completions(tokenizer, inputs, ids)
    torch.manual_seed(0)  # what is sampled differs by the steering alone
    ids = generate(wrapped, many, max_new_tokens=40, do_sample=True, top_p=0.9)
    tones[label] = tone_shares(completions(tokenizer, many, ids))


write("unsteered")
ways = {"+ to Love": direction, "− to Hate": -direction, "random": random_direction}
for label, one in ways.items():
    with steer(wrapped, layer, coeff * one):
        write(label)
print_texts(prompts, greedy)
title = f"tone of {len(many['input_ids'])} sampled texts each"
print(f"\n{title}")
for label, shares in tones.items():
    print(f"  {label:9}", *(f"{share:5.0%} {tone}" for tone, share in shares.items()))
figure = plot_tones(tones, title)
