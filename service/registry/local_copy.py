"""Local copy of the control document: a file, so that a restart without the store serves what was decided last."""

import logging
import os
from pathlib import Path
from typing import Self

import msgspec

from service.store.control_store import ControlDocument

log = logging.getLogger(__name__)


class LocalCopy:
    """One file per experiment in a folder that all workers of a host share. Neither method ever raises."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @classmethod
    def of(cls, folder: Path | None, *, experiment: str) -> Self | None:
        return None if folder is None else cls(folder / f"control-{experiment}.json")

    def read(self) -> ControlDocument | None:
        """None for none, and, with a warning, for one that cannot be read."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=ControlDocument)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
            log.warning("local copy unreadable", extra={"file": str(self._file), "reason": str(err)})
            return None

    def write(self, document: ControlDocument) -> None:
        """Replaces the file in one step. What cannot be written is logged: the store has it."""
        draft = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(document))
            draft.replace(self._file)
        except OSError as err:
            log.error("local copy not written", extra={"file": str(self._file), "reason": str(err)})  # noqa: TRY400
