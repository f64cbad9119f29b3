"""The documentation names what the code does."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRIC = re.compile(
    r'"((?:(?:objective|policy|critic|val|loss|completions|rollout|compute|timing|memory|score|update)/[a-z_]+)|padding_share)"'
)


def test_every_metric_is_defined() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = {name for path in (ROOT / "src" / "srppo" / "train").glob("*.py") for name in METRIC.findall(path.read_text(encoding="utf-8"))}
    assert len(logged) > 20
    assert not {name for name in logged if f"`{name}`" not in page}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
