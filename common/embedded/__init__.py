"""The small GPT-2 that ships with the project: data only, made by `embedded_model/`."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
