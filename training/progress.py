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


def say(text: str) -> None:
    """One line on what happens now, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, num: int, *, done: int = 0, unit: str = "rows", out: TextIO | None = None) -> Iterator[Advance]:
    """Show how far a job of `num` units is, of which `done` were done before: a note, units/s and the time left."""
    out = out or sys.stderr
    show = _rich_bar if out.isatty() else _lines
    with show(title, num, done, unit, out) as advance:
        yield advance


@contextmanager
def _rich_bar(title: str, num: int, done: int, unit: str, out: TextIO) -> Iterator[Advance]:
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
        began = shown = time.monotonic()
        passed = 0

        def advance(units: int, note: Callable[[], str] = str) -> None:
            nonlocal passed, shown
            passed += units
            now = time.monotonic()
            if now - shown >= FRAME_S:
                shown = now
                text = f"{note()}  {passed / (now - began):,.0f} {unit}/s"
                progress.update(task, completed=done + passed, note=text)

        yield advance


@contextmanager
def _lines(title: str, num: int, done: int, unit: str, out: TextIO) -> Iterator[Advance]:
    began = shown = time.monotonic()
    passed = 0

    def advance(units: int, note: Callable[[], str] = str) -> None:
        nonlocal passed, shown
        passed += units
        now = time.monotonic()
        if now - shown >= LINE_S:
            shown = now
            speed = passed / (now - began)
            share, left_s = (done + passed) / num, (num - done - passed) / speed
            print(f"{title}: {share:.0%}  {note()}  {speed:,.0f} {unit}/s  {left_s:.0f} s left", file=out, flush=True)

    yield advance
