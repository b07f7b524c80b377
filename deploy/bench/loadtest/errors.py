"""What cannot be measured, and why."""


class BenchError(ValueError):
    """What was given cannot be used, in one sentence: what was expected, what came, where."""
