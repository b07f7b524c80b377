"""Results of a load test as a Markdown table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.results import Figures


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, or the part of one that its label names."""

    label: str
    figures: Figures
    cpu_s_per_1000: float | None = None  # of the service, for a thousand candidates answered with 200
    closed: bool = False  # a closed loop: its latencies say nothing of the service's

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            **asdict(self.figures),
            "cpu_s_per_1000_candidates": self.cpu_s_per_1000,
            "invalid_reason": self.figures.invalid_reason,
            "closed_loop": self.closed,
        }


TITLES = (
    *("run", "offered/s", "goodput/s", "refused/s", "refused in, p99 ms", "late/s", "errors", "degraded"),
    *("p50 ms", "p99 ms", "p99.9 ms", "candidates/s", "CPU s per 1000 candidates"),
)


def table(rows: Sequence[Row]) -> str:
    """As Markdown, the columns lined up."""
    lines = [list(TITLES), *([row.label, *_cells(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def notes(rows: Sequence[Row]) -> list[str]:
    """Warnings below the table: results that are the generator's, and why some cells are empty."""
    lines = []
    for row in rows:
        if row.figures.invalid_reason is not None:
            lines.append(f"{row.label}: INVALID, the load generator was the limit: {row.figures.invalid_reason}")
        if row.figures.num_connection_waits and not row.closed:
            waits = row.figures.num_connection_waits
            lines.append(f"{row.label}: {waits} requests waited for a free connection: see --connections")
    if any(row.cpu_s_per_1000 is None for row in rows):
        lines.append("no CPU seconds of a part of a run, of one without answers, or where /metrics tells none")
    return lines


def _cells(row: Row) -> list[str]:
    f = row.figures
    latencies = ["", "", ""] if row.closed else [_ms(f.p50_ms), _ms(f.p99_ms), _ms(f.p999_ms)]
    return [
        "closed" if row.closed else f"{f.offered_per_s:,.1f}",
        f"{f.goodput_per_s:,.1f}",
        f"{f.refused_per_s:,.1f}",
        _ms(f.refused_p99_ms),
        f"{f.late_per_s:,.1f}",
        str(f.errors),
        str(f.degraded),
        *latencies,
        f"{f.candidates_per_s:,.0f}",
        "" if row.cpu_s_per_1000 is None else f"{row.cpu_s_per_1000:.5f}",
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
