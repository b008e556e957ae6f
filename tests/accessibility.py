"""What axe-core finds in a page."""

from typing import Any

import pytest


def assert_accessible(page: Any) -> None:
    """Let axe read an open page of Playwright; it finds nothing serious."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")
    found = axe.Axe().run(page).response
    serious = [
        (it["id"], [node["html"][:120] for node in it["nodes"]])
        for it in found["violations"]
        if it["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert len(found["passes"]) > 20
