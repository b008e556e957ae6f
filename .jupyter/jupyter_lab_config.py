"""What `make lab` adds to a reader's own settings of Jupyter."""

import warnings

from repository.notebooks import before_saving

warnings.filterwarnings(
    "ignore", "Overriding existing pre_save_hook", UserWarning
)  # Jupyter sets it twice
c.ContentsManager.pre_save_hook = before_saving  # noqa: F821 - Jupyter gives `c`
