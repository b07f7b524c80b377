"""The load test's own exception."""


class BenchError(ValueError):
    """Input that cannot be used, in one sentence: what was expected, what came, where."""
