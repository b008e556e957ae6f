wrapped = wrap(model, tokenizer)
before = snapshot(wrapped)  # to check at the end that nothing was left behind
pair = ("Love", "Hate")
words = [tokenizer(word, return_tensors="pt").to(model.device) for word in pair]
love, hate = (read(wrapped, word, layer)[0, -1] for word in words)  # [d_model] each
steering_vector = love - hate
direction = steering_vector / steering_vector.norm()
noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))
random_direction = (noise / noise.norm()).to(direction)
by_hand = torch.cosine_similarity(direction, vector, dim=0)
print(f"Love - Hate after block {layer} has norm {steering_vector.norm():.1f}")
print(f"cosine with the vector by hand {by_hand:.3f}")
print(f"why this layer: {preset.source}")
