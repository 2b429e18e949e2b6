"""``python -m ipo_ext COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# Command to the module whose main() runs it, imported only then, and what it does.
COMMANDS = {
    "demo": ("ipo_ext.demo", "train a small policy with the loss, on CPU"),
    "info": ("ipo_ext.diagnostics.info", "print what was built and what it runs under"),
    "mismatch": ("ipo_ext.mismatch", "say how far engine and trainer are apart, and why"),
    "verify": ("ipo_ext.diagnostics.verify", "check every operator on this machine's devices"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ipo_ext", description="ipo_ext's command line")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, description) in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=description)
    arguments, rest = parser.parse_known_args(argv)
    module, _ = COMMANDS[arguments.command]
    try:
        status = int(importlib.import_module(module).main(rest))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whatever reads the output, `head` say, has enough; Python would write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
