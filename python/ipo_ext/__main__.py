"""``python -m ipo_ext COMMAND``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ipo_ext", description="ipo_ext's command line")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", add_help=False, help="train a small policy with the loss, on CPU")
    arguments, rest = parser.parse_known_args(argv)
    assert arguments.command == "demo"
    from ipo_ext.demo import main as demo

    return demo(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
