"""Print the third-party requirements of the named extras, one a line: what an image installs before our own code."""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The core's requirements and those of the extras, our own extras among them replaced by what they stand for."""
    project = tomllib.loads(pyproject.read_text())["project"]
    requirements = list(project["dependencies"])
    pending = list(extras)
    while pending:
        for requirement in project["optional-dependencies"][pending.pop()]:
            if requirement.startswith("clickserve["):
                pending.append(requirement.removeprefix("clickserve[").rstrip("]"))
            else:
                requirements.append(requirement)
    return sorted(set(requirements))


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml"), sys.argv[1:])))
