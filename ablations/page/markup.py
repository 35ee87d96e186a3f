"""Pieces of HTML: tables that sort, figures that follow the page's colours, boxes that scroll."""

import re
from collections.abc import Iterable, Mapping
from html import escape

import pandas as pd

from ablations.page.plots import Plot
from ablations.rows.plots import COLOURS, MARKERS, to_svg

SIGNS = "●■▲◆▼✚✖◀▶"
# Pixels of the page for an inch of a figure, and between panels.
SCALE, GAP = 120, 24
# Colours of the plots that are the page's own, light and dark.
THEMED = {"#e6e6e6": "--line", "#888888": "--muted", "#ffffff": "--ground", "#000000": "--ink"}
THEMED |= {colour: f"--{name}" for name, colour in COLOURS.items()}
DARK = {
    "none": "#a3a3a3",
    "L": "#6cc3f2",
    "S": "#f2b134",
    "C": "#2fc496",
    "LS": "#4f9ff0",
    "LC": "#e79cc4",
    "SC": "#ff8140",
    "LSC": "#d977dc",
}


def colours(dark: bool) -> str:
    """The attentions' colours as CSS custom properties."""
    return " ".join(f"--{name}: {colour};" for name, colour in (DARK if dark else COLOURS).items())


def scroll(content: str, label: str) -> str:
    """A box that scrolls sideways by itself, also from the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>\n'


def notes(lines: Iterable[str]) -> str:
    """Sentences below something."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>\n' if items else ""


def table(text: pd.DataFrame, label: str) -> str:
    """A frame of text as a table that is sorted by a click on a heading; its column `attentions` names the rows."""
    names = [str(name) for name in text]
    numeric = {name: bool(text[name].str.match(r"^[+-]?\d|^$").all()) for name in names}
    head = "".join(
        f'<th scope="col"{"" if numeric[name] else " class=text"}><button type="button">{escape(name)}</button></th>'
        for name in names
    )
    rows = []
    for _, line in text.iterrows():
        kind = ["baseline"] * (line.get("attentions") == "baseline")
        kind += ["failed"] * ("ok" not in line.get("status", "ok"))
        cells = "".join(_cell(name, line[name], numeric[name]) for name in names)
        rows.append(f'<tr class="{" ".join(kind)}">{cells}</tr>\n' if kind else f"<tr>{cells}</tr>\n")
    return scroll(
        f'<table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody></table>', label
    )


def _cell(name: str, value: str, numeric: bool) -> str:
    if name == "attentions":
        return f'<th scope="row" class="text">{escape(value)}</th>'
    return f"<td>{escape(value)}</td>" if numeric else f'<td class="text">{escape(value)}</td>'


def plot(drawn: Plot, number: int, legend: str = "") -> str:
    """A plot's panels side by side as far as there is room, its caption below; of a mosaic the first is a large one."""
    panels = []
    for index, (title, figure) in enumerate(drawn.panels, 1):
        name = f"{drawn.name}-{number}-{index}"
        heading = f"<h4>{escape(title)}</h4>" if len(drawn.panels) > 1 else ""
        width = round(figure.get_figwidth() * SCALE)
        svg = themed(to_svg(figure, name, "none"), f"{drawn.title}: {title}")
        panels.append(f'<div class="panel" style="--width: {width}px">{heading}{svg}</div>')
    caption = f"<figcaption>{escape(drawn.caption)}</figcaption>" if drawn.caption else ""
    kind = "mosaic" if drawn.mosaic else "panels"
    whole = "100%" if drawn.mosaic else f"{len(drawn.panels) * (width + GAP)}px"
    return (
        f'<div class="plot" style="--width: {whole}"><h3>{escape(drawn.title)}</h3>\n'
        f'<figure>{legend}<div class="{kind}">{"".join(panels)}</div>{caption}</figure></div>\n'
    )


def themed(svg: str, label: str) -> str:
    """Matplotlib's SVG in the colours and fonts of the page, with short numbers and with what its points say."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Its style sheet would hold for the whole page; the page has it for plots.
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg class="drawn" {size[0] if size else ""} role="img" aria-label="{escape(label)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<text style=\"[^\"]*\"", lambda match: _text(match[0]), svg)
    svg = svg.replace("xlink:href=", "href=")
    for colour, name in THEMED.items():
        svg = svg.replace(f": {colour}", f": var({name})")
    svg = re.sub(r'<g id="[^"]*?tip:([^"]*)">', r"<g><title>\1</title>", svg)
    # Groups by the name of what they are; only what is referred to needs one.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    # Within tags alone: a tick may read 0.25.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<![\w#.-])-?\d+\.\d{2,}", _short, tag[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _text(tag: str) -> str:
    """Text without a font of its own, in a colour that can be read at its size."""
    tag = re.sub(r"(font: [^;\"]*?)([\d.]+)px[^;\"]*", r"\1\2px var(--font)", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    for name, colour in COLOURS.items():
        tag = tag.replace(f"fill: {colour}", f"fill: color-mix(in srgb, var(--{name}) 70%, var(--ink))")
    return tag


def legend(attentions: Iterable[str], markers: Mapping[int, str]) -> str:
    """Colours of the attentions and shapes of the depths; without depths the baseline is a dashed line."""
    present = set(attentions)
    items = [f"<li><i>{'★' if markers else '┅'}</i>baseline</li>"] if "baseline" in present else []
    items += [f'<li><i style="color: var(--{name})">●</i>{name}</li>' for name in COLOURS if name in present]
    items += [f"<li><i>{SIGNS[MARKERS.index(sign)]}</i>depth {depth}</li>" for depth, sign in markers.items()]
    return f'<ul class="legend">{"".join(items)}</ul>'
