"""Results of a test run, from pytest's JUnit report."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any


def read_junit(text: str) -> dict[str, Any]:
    """Counts of tests, which passed, what failed, why tests were skipped, and what they gave to `record_property`.

    Raises xml.etree.ElementTree.ParseError.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    names: list[str] = []
    failures: list[str] = []
    reasons: set[str] = set()
    properties: dict[str, str] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if bad is not None:
            message = (bad.get("message") or "").strip().partition("\n")[0]
            failures.append(f"{case.get('name')}: {message}")
        if skipped is not None:
            reasons.add(skipped.get("message") or "no reason given")
        counts["failed" if bad is not None else "skipped" if skipped is not None else "passed"] += 1
        if bad is None and skipped is None:
            names.append(case.get("name", ""))
        properties |= {entry.get("name", ""): entry.get("value", "") for entry in case.iter("property")}
    return counts | {"names": names, "failures": failures, "reasons": sorted(reasons), "properties": properties}
