"""Import aliases: today's module names in a checkout from before the folders of features, artifact and layers.

Importing this module installs them, if the checkout on sys.path is such a one.
"""

import importlib
import importlib.util
import sys

MOVED = {
    "models.features.arrays": "models.encoding",
    "models.features.encoder": "models.encoding",
    "models.features.field": "models.schema",
    "models.features.history": "models.encoding",
    "models.features.request": "models.encoding",
    "models.features.schema": "models.schema",
    "models.features.values": "models.values",
    "models.artifact.calibration": "models.calibration",
    "models.artifact.folder": "models.artifact",
    "models.layers.base": "models.blocks",
}


def _install() -> None:
    if importlib.util.find_spec("models.features") is not None:
        return
    for name, older in MOVED.items():
        sys.modules[name] = importlib.import_module(older)
    sys.modules["models.features"] = importlib.import_module("models")


_install()
