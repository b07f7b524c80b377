"""Open-loop load test of a running service: its knee, and what it does beyond it.

python deploy/bench/load.py --url http://127.0.0.1:8000 --schema artifacts/mian/20261121-1/schema.json
"""

import argparse
import sys

from loadtest import command
from loadtest.errors import BenchError


def main(argv: list[str] | None = None) -> int:
    """0 when all went well, 2 with one sentence on stderr when what the user gave cannot be used, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_options(parser)
    try:
        return command.run(parser.parse_args(argv))
    except BenchError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
