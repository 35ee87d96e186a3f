"""An exhibit as HTML: boxes side by side, positions of S, gates of L, slopes of C, maps around each attention."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ablations.exhibits.stored import Exhibit
from ablations.page.markup import scroll

STAGES = {"in": "input", "S": "behind S", "L": "behind L", "C": "behind C"}
NEIGHBOURS = ("same", "finer", "coarser")


def show(exhibit: Exhibit, number: int) -> str:
    """The exhibit's HTML.

    Args:
        exhibit: What `ablations.exhibits.make` kept.
        number: Tells its ids from those of other exhibits of the page.

    Raises:
        ValueError, TypeError, LookupError: It is not such a thing.
    """
    parts = [f'<p class="aside">{escape(note)}</p>\n' for note in exhibit["notes"]]
    parts.append(_pictures(exhibit, number))
    parts.append(_gates(exhibit))
    parts.append(_positions(exhibit, number))
    parts.append(_slopes(exhibit))
    parts.append(_maps(exhibit))
    return f'<div class="exhibit">{"".join(parts)}</div>\n'


def _uri(value: Any) -> str:
    if not re.fullmatch(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/]+=*", value):
        raise ValueError("an image of an exhibit is no JPEG or PNG")
    return value


def _image(picture: Mapping[str, Any], name: str) -> str:
    """An image that the drawings of the page refer to, stored in it once."""
    width, height = float(picture["width"]), float(picture["height"])
    return (
        f'<svg class="reset" aria-hidden="true"><defs><image id="{name}" width="{width:g}" height="{height:g}" '
        f'preserveAspectRatio="none" href="{_uri(picture["image"])}"/></defs></svg>'
    )


def _drawing(picture: Mapping[str, Any], name: str, content: str, label: str) -> str:
    width, height = float(picture["width"]), float(picture["height"])
    return (
        f'<svg class="picture" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f'<use href="#{name}"/>{content}</svg>'
    )


def _pictures(exhibit: Exhibit, number: int) -> str:
    if not exhibit["pictures"]:
        return ""
    sides: dict[str, list[str]] = {"rises": [], "falls": []}
    for index, picture in enumerate(exhibit["pictures"], 1):
        name = f"picture-{number}-{index}"
        before, after = (float(value) for value in picture["AP"])
        columns = (
            ("annotated", picture["truth"]),
            (f"baseline: AP {before:.1f}", picture["baseline"]),
            (f"LSC: AP {after:.1f}", picture["dyhead"]),
        )
        drawn = "".join(
            f"<figure>{_drawing(picture, name, _boxes(picture, boxes), title)}<figcaption>{title}</figcaption></figure>"
            for title, boxes in columns
        )
        title = f"<p>{after - before:+.1f} AP, image {escape(str(picture['image_id']))}</p>"
        sides["rises" if after > before else "falls"].append(
            f'{_image(picture, name)}<div class="trio">{title}{drawn}</div>\n'
        )
    shown = "".join(f"<div>{''.join(trios)}</div>" for trios in sides.values() if trios)
    return (
        "<h4>What the attentions change in detections</h4>\n<p class='aside'>The validation images whose own AP (IoU "
        "0.50:0.95, the classes that the image shows) rises most from the baseline to LSC, and those where it falls "
        f"most, of {int(exhibit['compared'])} images with objects: {int(exhibit['rise'])} rise, "
        f"{int(exhibit['fall'])} fall. As many boxes as the image has objects, by falling score; solid: right (its "
        f"class, IoU ≥ 0.5), dashed: wrong.</p>\n<div class='sides'>{shown}</div>\n"
    )


def _boxes(picture: Mapping[str, Any], boxes: Iterable[Mapping[str, Any]]) -> str:
    size = 0.075 * float(picture["width"])
    drawn, taken = [], list[tuple[float, float]]()
    for box in boxes:
        x, y, width, height = (float(value) for value in box["box"])
        kind = "truth" if "right" not in box else "right" if box["right"] else "wrong"
        words = str(box["label"]) + (f" {float(box['score']):.2f}" if "score" in box else "")
        # Names of boxes that share a corner stand below each other.
        line = max(y, 0) + size
        while any(abs(x - other) < 4 * size and abs(line - height) < size for other, height in taken):
            line += size / 2
        taken.append((x, line))
        # A letter is about 0.6 of its height wide.
        left = max(0.0, min(x + 0.2 * size, float(picture["width"]) - 0.6 * size * len(words)))
        drawn.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
            f'<text x="{left:.1f}" y="{line:.1f}" font-size="{size:.1f}" '
            f'stroke-width="{size / 5:.1f}">{escape(words)}</text>'
        )
    return "".join(drawn)


def _gates(exhibit: Exhibit) -> str:
    if not exhibit["gates"]:
        return ""
    released = exhibit["released"]
    head = "".join(f'<th scope="col">{name}</th>' for name in (NEIGHBOURS if released else ("gate",)))
    tables = []
    for block, levels in enumerate(exhibit["gates"], 1):
        rows = []
        for index, (level, gates) in enumerate(zip(exhibit["levels"], levels, strict=True)):
            values = dict(zip(_neighbours(index, len(levels)) if released else ("gate",), gates, strict=True))
            cells = "".join(_gate(values.get(name)) for name in (NEIGHBOURS if released else ("gate",)))
            rows.append(f'<tr><th scope="row">{escape(level)}</th>{cells}</tr>')
        tables.append(
            f'<div><h4>block {block}</h4><table class="heat narrow"><thead><tr><th scope="col">level</th>{head}</tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    return (
        "<h4>Scale attention (L): its gates</h4>\n<p class='aside'>The weight, from 0.5 to 1, that a level gives to "
        f"each map it averages{' (its own and those of its neighbours)' if released else ''}; mean over the first "
        f"{int(exhibit['images'])} validation images. 0.5 everywhere is what training starts near.</p>\n"
        f'<div class="panels">{"".join(tables)}</div>\n'
    )


def _neighbours(level: int, levels: int) -> list[str]:
    return ["same"] + ["finer"] * (level > 0) + ["coarser"] * (level < levels - 1)


def _gate(value: float | None) -> str:
    return "<td></td>" if value is None else f'<td style="--v: {2 * (value - 0.5):.2f}">{value:.3f}</td>'


def _positions(exhibit: Exhibit, number: int) -> str:
    if not exhibit.get("positions"):
        return ""
    picture, name = exhibit["picture"], f"shown-{number}"
    x, y = (float(value) for value in picture["point"])
    radius = 0.022 * max(float(picture["width"]), float(picture["height"]))
    panels = []
    for entry in exhibit["positions"]:
        title = f"block {entry['block']}, {entry['level']}"
        marks = []
        for neighbour, points in entry["samples"].items():
            kind = escape(str(neighbour))
            for across, down, mask in points:
                marks.append(
                    f'<circle class="{kind}" cx="{float(across):g}" cy="{float(down):g}" '
                    f'r="{radius * (0.35 + float(mask)):.2f}"><title>{kind}: {float(mask):.2f}</title></circle>'
                )
        cross = f'<circle class="point" cx="{x:g}" cy="{y:g}" r="{2.2 * radius:.1f}"/>'
        drawn = _drawing(picture, name, "".join(marks) + cross, f"positions of {title}")
        panels.append(f"<div><h4>{escape(title)}</h4>{drawn}</div>")
    keys = " ".join(
        f'<span class="key" style="color: {colour}">●</span>{words}'
        for colour, words in (("#d99a1c", "same level"), ("#4aa8dd", "finer"), ("#e0559f", "coarser"))
    )
    return (
        "<h4>Spatial attention (S): where one pixel looks</h4>\n<p class='aside'>For the output pixel at the middle of "
        f"the image's largest object (ring): the nine positions in each map that it reads. {keys}. Size: the mask. "
        f"Image {escape(str(picture['image_id']))}, that of the largest gain; positions may lie outside of it.</p>\n"
        f'{_image(picture, name)}<div class="positions">{"".join(panels)}</div>\n'
    )


def _slopes(exhibit: Exhibit) -> str:
    blocks = exhibit["slopes"]
    if not blocks:
        return ""
    columns = max(len(levels) for levels in blocks if levels)
    levels = exhibit["levels"] if exhibit["released"] else ["all levels"]
    furthest = max(
        max(abs(a1 - 1), abs(a2))
        for points in blocks
        if points
        for each in points
        for a1, a2 in zip(*each, strict=True)
    )
    reach = next(reach for reach in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if furthest <= reach or reach == 1.0)
    cells = ["<span></span>", *(f"<b>{escape(level)}</b>" for level in levels)]
    for block, points in enumerate(blocks, 1):
        if points:
            cells += [f"<b>block {block}</b>", *(_cloud(each[0], each[1], reach, f"block {block}") for each in points)]
    return (
        "<h4>Task attention (C): the slopes of each channel</h4>\n<p class='aside'>A dot a channel: across a1 from "
        f"{1 - reach:g} to {1 + reach:g}, up a2 from −{reach:g} to {reach:g}. Training starts at the crossing, (1, 0), "
        f"a ReLU. Mean over the first {int(exhibit['images'])} validation images.</p>\n"
        f'<div class="slopes" style="--columns: {columns}">{"".join(cells)}</div>\n'
    )


def _cloud(first: Sequence[float], second: Sequence[float], reach: float, label: str) -> str:
    points = "".join(f"M{(a1 - 1) / reach:.2f} {-a2 / reach:.2f}h0" for a1, a2 in zip(first, second, strict=True))
    return (
        f'<svg viewBox="-1.1 -1.1 2.2 2.2" role="img" aria-label="{escape(label)}: slopes of {len(first)} channels">'
        f'<line x1="-1" x2="1"/><line y1="-1" y2="1"/><path d="{points}"/></svg>'
    )


def _maps(exhibit: Exhibit) -> str:
    parts = []
    for entry in exhibit.get("maps", ()):
        stages = entry["stages"]
        cells = ["<span></span>", *(f"<b>{STAGES[stage['stage']]}</b>" for stage in stages)]
        for index in range(len(stages[0]["levels"])):
            shown = [stage["levels"][index] for stage in stages]
            cells.append(f"<b>{escape(exhibit['levels'][shown[0]['level']])}</b>")
            cells += [
                f'<span><img src="{_uri(each["image"])}" alt="mean activation"><small>max {float(each["largest"]):.2f}'
                "</small></span>"
                for each in shown
            ]
        grid = f'<div class="maps" style="--columns: {len(stages)}">{"".join(cells)}</div>'
        parts.append(f"<div><h4>block {int(entry['block'])}</h4>{scroll(grid, 'maps of a block')}</div>")
    if not parts:
        return ""
    return (
        "<h4>Maps before and behind each attention</h4>\n<p class='aside'>Mean |activation| over channels, from 0 "
        "(dark) to each map's own largest value (bright); behind S the mean over the maps that a level samples. "
        f"Image {escape(str(exhibit['picture']['image_id']))}.</p>\n<div class='sides'>{''.join(parts)}</div>\n"
    )
