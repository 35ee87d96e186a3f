"""AP of every class in every cell, means over seeds, coloured by the difference from the detector's baseline."""

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from statistics import fmean

from ablations.page.markup import scroll
from ablations.rows.frame import SUBSETS, formulation_name
from ablations.rows.row import Row, good

# Points of difference that have the full colour.
FULL = 15.0
Name = tuple[str, str, int | None, str]


def class_table(rows: Iterable[Row]) -> str:
    """A heading and a table of cells × classes, the longer of the two downwards; empty where no row has classes."""
    values: defaultdict[Name, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cell, by_class = row["cell"], row.get("class_AP")
        if not good(row) or not isinstance(by_class, dict):
            continue
        formulation = formulation_name(cell.get("formulation"), cell.get("coarse_offsets"), cell.get("placement"))
        for name, value in by_class.items():
            if isinstance(value, int | float):
                values[cell["detector"], cell["attentions"], cell["depth"], formulation][str(name)].append(value)
    if not values:
        return ""
    means = {cell: {name: fmean(seeds) for name, seeds in each.items()} for cell, each in values.items()}
    cells = sorted(means, key=_rank)
    classes = sorted({name for each in means.values() for name in each})
    several = [len({cell[part] for cell in cells if cell[1] != "baseline"}) > 1 for part in (0, 3)]

    def heading(cell: Name) -> str:
        detector, attentions, depth, formulation = cell
        words = [detector] * several[0] + [attentions if depth is None else f"{attentions} ×{depth}"]
        return ", ".join(words + [formulation] * (several[1] and bool(formulation)))

    def field(cell: Name, name: str) -> str:
        value = means[cell].get(name)
        if value is None:
            return "<td></td>"
        before = next((means[other].get(name) for other in cells if other[:2] == (cell[0], "baseline")), None)
        if before is None or cell[1] == "baseline":
            return f"<td>{value:.1f}</td>"
        kind, share = "better" if value > before else "worse", min(1.0, abs(value - before) / FULL)
        return f'<td class="{kind}" style="--v: {share:.2f}" title="{value - before:+.1f}">{value:.1f}</td>'

    down = [(heading(cell), [field(cell, name) for name in classes]) for cell in cells]
    across = classes
    if len(classes) > len(cells):
        down = [(name, [field(cell, name) for cell in cells]) for name in classes]
        across = [heading(cell) for cell in cells]
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in across)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(fields)}</tr>\n' for name, fields in down)
    corner = '<th scope="col" class="text"><button type="button">cell</button></th>'
    if across is not classes:
        corner = corner.replace("cell", "class")
    return (
        "<h3>AP of each class</h3>\n<p class='aside'>Means over the seeds; green above and red below the detector's "
        f"baseline, in full colour from {FULL:g} points on. Classes have no intervals here: read colours, not "
        "digits.</p>\n"
        + scroll(
            f'<table class="sortable heat"><thead><tr>{corner}{head}</tr></thead><tbody>{body}</tbody></table>',
            "AP of each class",
        )
    )


def _rank(cell: Name) -> tuple[str, int, int, str]:
    order = ("baseline", *SUBSETS)
    detector, attentions, depth, formulation = cell
    return detector, order.index(attentions) if attentions in order else len(order), depth or 0, formulation
