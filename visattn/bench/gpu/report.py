"""The results of a run on a GPU as JSON and Markdown: correctness, then times as ratios."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from visattn.bench.timing import Timing, table


@dataclass(frozen=True)
class Check:
    """One result against float64: the relative error and its limit."""

    what: str
    at: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        """Whether the error is within its limit; false for NaN."""
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "right" if self.right else "WRONG"
        return (
            f"{verdict}: {self.what}, {self.at}: "
            f"relative error {self.error:.1e}, limit {self.limit:.0e}"
        )


@dataclass(frozen=True)
class Measurement:
    """One result line of a benchmark, with its reference in the same run.

    Args:
        what: what was measured.
        at: on which input.
        work: which part of it, such as "forward".
        value: what it needs.
        against: the name of the reference.
        reference: what the reference needs.
        aim: the largest ratio to the reference that is aimed at.
        floor: the time that the roofline allows.
        share_aim: the smallest share of the roofline that is aimed at.
        unit: of value and reference.
    """

    what: str
    at: str
    work: str
    value: Timing
    against: str = ""
    reference: Timing | None = None
    aim: float | None = None
    floor: float | None = None
    share_aim: float | None = None
    unit: str = "ms"

    @property
    def ratio(self) -> float | None:
        """Value over reference."""
        if self.reference is None:
            return None
        return self.value.median / max(self.reference.median, 1e-9)

    @property
    def share(self) -> float | None:
        """Share of the roofline that is reached."""
        if self.floor is None:
            return None
        return self.floor / self.value.median

    @property
    def met(self) -> bool | None:
        """Whether the aims were met; None where there were none."""
        reached = []
        if self.aim is not None and self.ratio is not None:
            reached.append(self.ratio <= self.aim)
        if self.share_aim is not None and self.share is not None:
            reached.append(self.share >= self.share_aim)
        if not reached:
            return None
        return all(reached)

    def cells(self) -> list[str]:
        """The line as text, in the order of HEADER."""
        reference = ""
        if self.reference is not None:
            reference = f"{self.against}: {self.reference}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        share = "" if self.share is None else f"{self.share:.0%}"
        value = f"{self.value} {self.unit}"
        return [
            self.what,
            self.at,
            self.work,
            value,
            reference,
            ratio,
            share,
            self._aims(),
        ]

    def _aims(self) -> str:
        words = []
        if self.aim is not None:
            words.append(f"<= {self.aim:g}x")
        if self.share_aim is not None:
            words.append(f">= {self.share_aim:.0%}")
        if self.met is not None:
            words.append("met" if self.met else "not met")
        return " ".join(words)


HEADER = (
    "what",
    "at",
    "work",
    "it: median (low-high)",
    "reference",
    "it / reference",
    "of the roofline",
    "aim",
)


@dataclass
class BenchmarkReport:
    """Facts of the machine, checks, measurements by section; what is missing, with the reason."""

    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    sections: dict[str, list[Measurement]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, the derived numbers included."""
        sections: dict[str, list[dict]] = {}
        for name, measurements in self.sections.items():
            sections[name] = []
            for measurement in measurements:
                derived = {
                    "ratio": measurement.ratio,
                    "share": measurement.share,
                    "met": measurement.met,
                }
                sections[name].append(asdict(measurement) | derived)
        return {
            "facts": self.facts,
            "checks": [asdict(check) | {"right": check.right} for check in self.checks],
            "sections": sections,
            "not_measured": self.missing,
        }

    def markdown(self) -> str:
        """All of it as a page, correctness first."""
        paragraphs = ["# On a GPU", _bullets(_pairs(self.facts))]
        paragraphs += ["## Correctness, against float64", _bullets(self.checks)]
        for name, measurements in self.sections.items():
            lines = [measurement.cells() for measurement in measurements]
            paragraphs += [f"## {name}", table(HEADER, lines)]
        if self.missing:
            paragraphs += ["## Not measured", _bullets(_pairs(self.missing))]
        return "\n\n".join(paragraphs) + "\n"

    def write(self, folder: Path) -> None:
        """Write gpu.json and gpu.md."""
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.as_dict(), indent=1)
        (folder / "gpu.json").write_text(content + "\n", "utf-8")
        (folder / "gpu.md").write_text(self.markdown(), "utf-8")


def _pairs(table: dict[str, str]) -> list[str]:
    return [f"{key}: {value}" for key, value in table.items()]


def _bullets(lines: Iterable[object]) -> str:
    return "\n".join(f"- {line}" for line in lines)
