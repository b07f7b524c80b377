"""The files that a source names: one file, a folder of parts or a glob; what each is, told by its first bytes."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.errors import UserError

Form = Literal["Parquet", "CSV"]
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
STRANGERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\x89HDF": "an HDF5 file",
    b"SQLite": "an SQLite database",
}


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """The files of one table, all Parquet or all CSV, in the order of their names.

    `partitions` holds for each file what its folders say, as in `day=2026-11-01/part-0.parquet`.
    """

    source: Path
    paths: tuple[Path, ...]
    form: Form
    partitions: tuple[tuple[tuple[str, str], ...], ...]


def exists(source: Path) -> bool:
    return source.exists() or (glob.has_magic(str(source)) and bool(_found(source)))


def find(source: Path) -> TableFiles:
    """Raises UserError where there is none, and where they are of several forms or of one that is not read.

    In a folder, and in those below it, names that begin with `_` or `.` are left out, as engines do that write parts.
    """
    paths = _found(source)
    if not paths:
        what = "no file in this folder" if source.is_dir() else "no such file"
        raise UserError(f"{source}: {what}")
    form = one_form(source, [_form(path) for path in paths])
    root = source if source.is_dir() else Path(source.anchor)
    partitions = tuple(_partition(path, root) for path in paths)
    names = [tuple(name for name, _ in partition) for partition in partitions]
    other = next((n for n, name in enumerate(names) if name != names[0]), None)
    if other is not None:
        raise UserError(f"{source}: expected folders of one depth, got {paths[0]} beside {paths[other]}")
    return TableFiles(source=source, paths=tuple(paths), form=form, partitions=partitions)


def one_form(source: Path, forms: Sequence[Form]) -> Form:
    """The form of all. Raises UserError where they differ."""
    if len(set(forms)) > 1:
        raise UserError(f"{source}: expected files of one form, got {' and '.join(sorted(set(forms)))}")
    return forms[0]


def _found(source: Path) -> list[Path]:
    if source.is_dir():
        below = [path for path in source.rglob("*") if path.is_file()]
        return sorted(p for p in below if not any(part[0] in "_." for part in p.relative_to(source).parts))
    if source.is_file():
        return [source]
    if not glob.has_magic(str(source)):
        return []
    found = [Path(name) for name in glob.glob(str(source), recursive=True)]  # noqa: PTH207 - a pattern may begin at /
    return sorted(path for path in found if path.is_file())


def _form(path: Path) -> Form:
    try:
        with path.open("rb") as file:
            first = file.read(8)
    except OSError as err:
        raise UserError(f"{path}: unreadable ({err.strerror})") from err
    if first.startswith(b"PAR1"):
        return "Parquet"
    stranger = next((words for magic, words in STRANGERS.items() if first.startswith(magic)), None)
    if stranger is not None:
        raise UserError(f"{path}: expected Parquet, or CSV in UTF-8 (packed with gzip or zstd or not), got {stranger}")
    if path.suffix == ".parquet":
        raise UserError(f"{path}: expected a Parquet file, which begins with PAR1, got {first!r}")
    return "CSV"


def _partition(path: Path, root: Path) -> tuple[tuple[str, str], ...]:
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return tuple((name, value) for name, equals, value in (part.partition("=") for part in folders) if equals)
