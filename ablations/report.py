"""`python -m ablations.report DIR`: tables, plots and one self-contained `report.html`, from the rows of DIR.

With `--data DATA` it also looks into the deepest LSC cell's weights, if DIR still has them: gates, positions, slopes,
maps, and boxes on validation images. What it finds is kept in `DIR/exhibits`, so later reports need neither.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from ablations.data.coco import read_dataset
from ablations.exhibits.make import write_exhibits
from ablations.files import atomic_write_text
from ablations.page.page import make_page
from ablations.rows.picture import write_pictures
from ablations.rows.row import Row
from ablations.rows.sections import make_sections
from ablations.rows.statistics import stored_replicates
from ablations.rows.store import read_all
from ablations.rows.tables import write_tables


def write_results(rows: Iterable[Row], directory: str | Path, problems: Iterable[str] = ()) -> list[Path]:
    """Write all that is made from rows: the tables, the pictures, the report; arguments and errors as below."""
    rows = list(rows)
    return [
        *write_tables(rows, directory),
        *write_pictures(rows, directory),
        write_report(rows, directory, problems),
    ]


def write_report(rows: Iterable[Row], directory: str | Path, problems: Iterable[str] = ()) -> Path:
    """Write `report.html` into `directory`; it needs no other file and no network.

    Args:
        rows: What it is made of (`read_rows`).
        directory: Where it goes, and where loss curves and exhibits are looked for.
        problems: Files that are not rows, one sentence each; they stand at its top.

    Returns:
        The file.

    Raises:
        ValueError: There are no rows.
        OSError: The file cannot be written.
    """
    directory = Path(directory)
    sections = make_sections(rows, stored_replicates(directory))
    if not sections:
        raise ValueError(f"{directory} holds no rows to report on")
    path = directory / "report.html"
    atomic_write_text(path, make_page(sections, directory, problems))
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where there is nothing to report on."""
    parser = argparse.ArgumentParser(prog="python -m ablations.report", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a directory that ablations.run wrote its rows to")
    parser.add_argument("--data", type=Path, metavar="DATA", help="the data set of the rows, to make exhibits anew")
    options = parser.parse_args(arguments)
    directory = options.directory
    if not directory.is_dir():
        print(f"error: there is no directory {directory}", file=sys.stderr)
        return 2
    try:
        rows, problems = read_all(directory)
        if options.data is not None:
            write_exhibits(rows, directory, read_dataset(options.data))
        paths = write_results(rows, directory, problems)
    except (ValueError, OSError) as error:
        print(f"error: {error}; rows are read from {directory / 'cells'}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
