"""A long job seen from the terminal: a bar, or a plain line every few seconds where nobody watches one."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

LINE_S = 5.0  # between two plain lines
FRAME_S = 0.2  # between two states of the bar


class Advance(Protocol):
    """Tells the bar that so many units more are done. `note` is called only when something is shown."""

    def __call__(self, units: int, note: Callable[[], str] = str) -> None: ...


_Draw = Callable[[int, str, float], None]
"""Shows how many rows are done, a note, and rows/s."""


def say(text: str) -> None:
    """One line on what happens now, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, num: int, *, done: int = 0, out: TextIO | None = None) -> Iterator[Advance]:
    """Show how far a job of `num` rows is, of which `done` were done before: a note, rows/s and the time left."""
    out = out or sys.stderr
    show, every_s = (_rich_bar, FRAME_S) if out.isatty() else (_lines, LINE_S)
    with show(title, num, done, out) as draw:
        began = shown = time.monotonic()
        passed = 0

        def advance(units: int, note: Callable[[], str] = str) -> None:
            nonlocal passed, shown
            passed += units
            now = time.monotonic()
            if now - shown >= every_s:
                shown = now
                draw(done + passed, note(), passed / (now - began))

        yield advance


@contextmanager
def _rich_bar(title: str, num: int, done: int, out: TextIO) -> Iterator[_Draw]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(file=out), transient=True) as progress:
        task = progress.add_task(title, total=num, completed=done, note="")

        def draw(done: int, note: str, speed: float) -> None:
            progress.update(task, completed=done, note=f"{note}  {speed:,.0f} rows/s")

        yield draw


@contextmanager
def _lines(title: str, num: int, _done: int, out: TextIO) -> Iterator[_Draw]:
    def draw(done: int, note: str, speed: float) -> None:
        left_s = (num - done) / speed
        print(f"{title}: {done / num:.0%}  {note}  {speed:,.0f} rows/s  {left_s:.0f} s left", file=out, flush=True)

    yield draw
