"""The service needs no torch."""

import subprocess
import sys


def test_the_service_starts_without_torch() -> None:
    code = """
import sys
import service.app, service.process.server, service.__main__
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "training", "polars", "sklearn"})
print(loaded)
"""

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "[]"
