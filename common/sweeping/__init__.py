"""Layers, coefficients and prompts in one batch, kept in a file."""
