"""`main`: the subcommands, their arguments, and what a user sees of an error: one line, and exit status 2."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lora_lite.cli import combine, convert, info, merge, plot
from lora_lite.cli.opened import quietly

COMMANDS = {"info": info, "merge": merge, "convert": convert, "combine": combine, "plot": plot}


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong and where help is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)  # argparse takes -1e-3 for an option

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    from lora_lite import __version__

    found = Parser(prog="lora-lite", description="Look at adapters, merge, convert and combine them. Models are never loaded whole.")
    found.add_argument("--version", action="version", version=f"lora-lite {__version__}")
    commands = found.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        one = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no notes, only errors")
        module.arguments(one)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Returns:
        The exit status: 0, 2 for wrong arguments and input, 130 where the user stopped it, 141 where nobody reads on, as behind `head`.
        Errors are printed on stderr, each on one line.
    """
    try:
        args = parser().parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    name = f"lora-lite {args.command}"
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            COMMANDS[args.command].run(args)
            sys.stdout.flush()
            status = 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more, and fails
            status = 141
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as e:
            status, lines = 2, [f"{name}: error: {_line(e)}"]
        except KeyboardInterrupt:
            status, lines = 130, [f"{name}: stopped. Nothing was written."]
    if status == 0 and not args.quiet:
        lines = [f"{name}: warning: {text}" for text in quietly(caught)]
    for line in lines:
        print(line, file=sys.stderr)
    return status


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        text = f'"{Path(str(error.filename))}": {error.strerror}. Check the path, its rights and the free space.'
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
