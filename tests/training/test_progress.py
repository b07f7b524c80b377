import io
import itertools
from types import SimpleNamespace

from training import progress


def test_where_nobody_watches_a_plain_line_comes_every_few_seconds(monkeypatch):
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr("training.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()

    with progress.bar("epoch 1/3", 1000, done=500, out=out) as advance:
        for _ in range(5):
            advance(100, lambda: "loss 0.5")

    # Two seconds a call: the third is the first that is five seconds after the start, and the log stays short.
    assert out.getvalue().splitlines() == ["epoch 1/3: 80%  loss 0.5  50 rows/s  4 s left"]


def test_a_terminal_gets_a_bar_that_vanishes_when_it_is_done(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr("training.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()

    with progress.bar("epoch 1/3", 200, out=out) as advance:
        advance(100, lambda: "loss 0.5")
        advance(100, lambda: "loss 0.4")

    assert "epoch 1/3" in out.getvalue()
    assert "loss 0.4  50 rows/s" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")
