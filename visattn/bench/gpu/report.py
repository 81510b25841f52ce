"""What a run on a GPU found, as JSON and as Markdown: correctness first, then times as ratios within the run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from visattn.bench.timing import Timing, table


@dataclass(frozen=True)
class Check:
    """One result against float64: the relative error and how large it may be."""

    what: str
    at: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def __str__(self) -> str:
        word = "right" if self.right else "WRONG"
        return f"{word}: {self.what}, {self.at}: relative error {self.error:.1e}, limit {self.limit:.0e}"


@dataclass(frozen=True)
class Row:
    """One measurement with its reference in the same run; ``floor`` is the time that the roofline allows.

    ``aim`` is the largest ratio to the reference that was aimed at, ``share_aim`` the smallest
    share of the roofline.
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
        return (
            None if self.reference is None else self.value.median / max(self.reference.median, 1e-9)
        )

    @property
    def share(self) -> float | None:
        return None if self.floor is None else self.floor / self.value.median

    @property
    def met(self) -> bool | None:
        """Whether the aims were met; None where there were none."""
        reached = []
        if self.aim is not None and self.ratio is not None:
            reached.append(self.ratio <= self.aim)
        if self.share_aim is not None and self.share is not None:
            reached.append(self.share >= self.share_aim)
        return all(reached) if reached else None

    def cells(self) -> list[str]:
        reference = "" if self.reference is None else f"{self.against}: {self.reference}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        share = "" if self.share is None else f"{self.share:.0%}"
        aim = "" if self.aim is None else f"<= {self.aim:g}x "
        share_aim = "" if self.share_aim is None else f">= {self.share_aim:.0%} "
        met = {True: "met", False: "not met", None: ""}[self.met]
        value = f"{self.value} {self.unit}"
        return [
            self.what,
            self.at,
            self.work,
            value,
            reference,
            ratio,
            share,
            f"{aim}{share_aim}{met}",
        ]


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
class Report:
    """Facts of the machine, checks, rows by section, and what was not measured, with the reason."""

    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    sections: dict[str, list[Row]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict:
        rows = {
            name: [
                asdict(row) | {"ratio": row.ratio, "share": row.share, "met": row.met}
                for row in section
            ]
            for name, section in self.sections.items()
        }
        checks = [asdict(check) | {"right": check.right} for check in self.checks]
        return {
            "facts": self.facts,
            "checks": checks,
            "sections": rows,
            "not_measured": self.missing,
        }

    def markdown(self) -> str:
        parts = ["# On a GPU", "\n".join(f"- {key}: {value}" for key, value in self.facts.items())]
        parts += [
            "## Correctness, against float64",
            "\n".join(f"- {check}" for check in self.checks),
        ]
        for name, rows in self.sections.items():
            parts += [f"## {name}", table(HEADER, [row.cells() for row in rows])]
        if self.missing:
            parts += [
                "## Not measured",
                "\n".join(f"- {name}: {reason}" for name, reason in self.missing.items()),
            ]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n", "utf-8")
        (folder / "gpu.md").write_text(self.markdown(), "utf-8")
