def show(label):
    texts = completions(tokenizer, inputs, generate(wrapped, inputs, max_new_tokens=12))
    print(label)
    for prompt, text in zip(prompts, texts):
        print(f"    {prompt!r:28} -> {text.strip()!r}")


show("unsteered")
directions = {"to Love": direction, "to Hate": -direction, "random": random_direction}
for label, one in directions.items():
    with steer(wrapped, layer, coeff * one):
        show(label)
