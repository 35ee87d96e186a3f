"""`python -m ablations.publish DIR results/NAME`: copy the rows of a run to `results/` and rebuild its tables there.

Rows are copied as they are; checkpoints stay behind. With `--readme FILE` the tables also replace what stands between
the two markers of that file.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ablations.files import atomic_write_text
from ablations.report import write_results
from ablations.rows.store import read_all, read_rows

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def publish(source: Path, target: Path) -> None:
    """Copy the rows of `source` to `target`, on top of what is there, and make the tables and pictures anew.

    Raises:
        ValueError: `source` has no rows.
    """
    if not read_rows(source):
        raise ValueError(f"{source} holds no rows to publish")
    (target / "cells").mkdir(parents=True, exist_ok=True)
    for path in (source / "cells").glob("*.json"):
        shutil.copy(path, target / "cells" / path.name)
    rows, problems = read_all(target)
    write_results(rows, target, problems)


def insert(table: str, readme: Path) -> None:
    """Replace what stands between the markers of `readme`.

    Raises:
        ValueError: A marker is missing.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} needs a line {BEGIN} and a line {END} behind it")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    atomic_write_text(readme, f"{before}{BEGIN}\n{table.strip()}\n{END}{after}")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where there is nothing to publish."""
    parser = argparse.ArgumentParser(prog="python -m ablations.publish", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a directory that ablations.run wrote its rows to")
    parser.add_argument("target", type=Path, metavar="results/NAME", help="where to publish")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="insert the tables here, too")
    options = parser.parse_args(arguments)
    try:
        publish(options.directory, options.target)
        if options.readme:
            insert((options.target / "table.md").read_text(), options.readme)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.target / "table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
