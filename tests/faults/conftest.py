"""The running service of the service's own tests."""

from tests.service.conftest import artifacts, start

__all__ = ["artifacts", "start"]
