"""What steering did: tone, likelihood, next token, perplexity, effects, ratings."""
