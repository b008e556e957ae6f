"""Generating, sampling and completing texts, steered or not."""
