"""`python -m fused_ce info` and `python -m fused_ce bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fused_ce import backends
from fused_ce.bench import command
from fused_ce.bench.losses import LOSSES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_ce")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="versions, architectures, and what serves which op")
    info.set_defaults(run=_info)
    bench = commands.add_parser("bench", help="time a loss against torch's own")
    losses = bench.add_subparsers(required=True, metavar="loss", help=", ".join(LOSSES))
    for name in LOSSES:
        command.add_loss(losses.add_parser(name), name)
    options = parser.parse_args(argv)
    status: int = options.run(options)
    return status


def _info(_: argparse.Namespace) -> int:
    build = list(backends.build_info().items())
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for row in (*build, ("op", "device", "backend"), *backends.table()):
            print(*(cell.ljust(20) for cell in row))
        return 0
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for row in build:
        grid.add_row(*row)
    console.print(grid)
    served = Table("op", "device", "backend")
    for row in backends.table():
        served.add_row(*row)
    console.print(served)
    return 0


if __name__ == "__main__":
    sys.exit(main())
