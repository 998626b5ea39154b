"""Findings of an examination: lines of a report with a mark, and a verdict."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from minillm.base.log import plural
from minillm.base.requirements import own_version

Mark = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. A problem keeps `train` from running; a warning does not."""

    mark: Mark
    subject: str
    found: str
    remedy: str = ""  # a command or a sentence


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
problem = partial(Finding, "problem")


def problems(findings: Sequence[Finding]) -> int:
    """Return the number of problems."""
    return sum(finding.mark == "problem" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Return the findings in columns, below the version and the system."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"minillm {own_version()} on {platform.system()} {platform.machine()}", ""]
    for finding in findings:
        lines.append(f"{finding.mark:<8} {finding.subject:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)


def report(findings: Sequence[Finding]) -> str:
    """Return the findings as a table, and a verdict."""
    number = problems(findings)
    verdict = "train can run."
    if number:
        verdict = f"{plural(number, 'problem')}: fix before you train."
    return f"{table(findings)}\n\n{verdict}"
