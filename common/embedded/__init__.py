"""The small GPT-2 that ships with the project: weights, tokenizer, preset and lexicon. `embedded_model/` made it."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
