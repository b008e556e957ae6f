"""A small GPT-2 that ships with the project, and everything that made it.

`grammar` writes the corpus, `tokenizer` and `train` turn it into the model in this folder, `sweep` chooses where to
steer it, `evaluate` measures it and writes the model card.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
