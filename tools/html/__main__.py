"""Write the page of a notebook or of the theory from the command line."""

import argparse
import sys
from pathlib import Path

from src import ProjectError
from tools.html import notebook_to_html, theory_images, theory_to_html


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m tools.html` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.html", description="HTML of notebooks and theory"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, names in (
        ("notebook", notebook_to_html, ("path", "out")),
        ("theory", theory_to_html, ("out",)),
        ("images", theory_images, ("folder",)),
    ):
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        for argument in names:
            command.add_argument(argument, type=Path)
    options = vars(parser.parse_args(arguments))
    command, function = options.pop("command"), options.pop("function")
    try:
        outcome = function(**options)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in outcome if command == "notebook" else ():
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
