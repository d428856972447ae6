"""The command line of the archive: build it, or run it elsewhere."""

import argparse
import sys
from pathlib import Path

from src import ProjectError
from tools.submission import archive, rerun


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m tools.submission` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission", description="The archive to hand in, and its rerun."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="write HW3-Name-StudentNumber.zip")
    command.add_argument("--name", default="", help="the student's name")
    command.add_argument("--id", default="", help="the student number")
    command.add_argument("--collaborators", default="", help="discussed with (default: none)")
    command.add_argument("--allow-standin", action="store_true", help="also stand-in runs, marked")
    command = commands.add_parser("rerun", help="run an archive afresh and compare the numbers")
    command.add_argument("--zip", default="", help="the archive (default: that of this project)")
    command.add_argument("--python", type=Path, help="an interpreter that has the requirements")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "build":
            archive.build(chosen.name, chosen.id, chosen.collaborators, chosen.allow_standin)
        elif failed := rerun.rerun(rerun.find_archive(chosen.zip), chosen.python):
            raise ProjectError(f"failed elsewhere: {', '.join(failed)}")
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
