model, tokenizer, preset = load_model()
