"""Settings for every test; in the root because nbval reads no tests/conftest.py for notebooks."""

import os
from pathlib import Path

from repository.notebooks import clean_environment

ROOT = Path(__file__).resolve().parent


def pytest_configure() -> None:
    """Set the environment that tests and notebook kernels inherit, before either loads a model."""
    clean_environment(os.environ)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collect tests/, guides/ and the root's notebooks, and nothing in any other folder."""
    if (
        collection_path.is_dir()
        and collection_path.parent == ROOT
        and collection_path.name not in ("tests", "guides")
    ):
        return True
    return None  # the other plugins decide
