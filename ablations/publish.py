"""`python -m ablations.publish DIR results/NAME`: copy the rows of a run to `results/` and rebuild its tables there.

Rows are copied as they are, with what tables, intervals and the report are made of: replicates, loss curves, exhibits.
Checkpoints stay behind, and detections unless they are asked for. With `--readme FILE` a short table also replaces what
stands between the two markers of that file.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ablations.evaluation import detections, replicates
from ablations.exhibits.stored import FOLDER
from ablations.experiment.curve import CURVE
from ablations.files import atomic_write_text
from ablations.report import write_results
from ablations.rows.sections import make_sections
from ablations.rows.statistics import stored_replicates
from ablations.rows.store import read_all, read_rows
from ablations.rows.tables import to_summary

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def publish(source: Path, target: Path, with_detections: bool = False) -> None:
    """Copy the rows of `source` to `target`, on top of what is there, and make the tables and pictures anew.

    Args:
        source: A directory that `ablations.run` wrote to.
        target: Where to publish.
        with_detections: Whether the detections go along, which are the largest part.

    Raises:
        ValueError: `source` has no rows.
        OSError: A file cannot be copied.
    """
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} holds no rows to publish")
    names = [replicates.FILE, CURVE] + [detections.FILE] * with_detections
    wanted = [Path("cells") / f"{row['key']}.json" for row in rows]
    wanted += [Path("cells") / row["key"] / name for row in rows for name in names]
    wanted += [path.relative_to(source) for path in (source / FOLDER).glob("*.json")]
    for path in wanted:
        if (source / path).is_file():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
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
    readme = "insert a short table here, too; can be given several times"
    parser.add_argument("--readme", type=Path, metavar="FILE", action="append", default=[], help=readme)
    parser.add_argument("--with-detections", action="store_true", help="publish the detections, too")
    options = parser.parse_args(arguments)
    try:
        publish(options.directory, options.target, options.with_detections)
        for readme in options.readme:
            sections = make_sections(read_rows(options.target), stored_replicates(options.target))
            insert("\n".join(map(to_summary, sections)), readme)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.target / "table.md")
    total = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target} holds {total / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
