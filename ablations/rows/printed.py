"""The figures printed in Dai et al., "Dynamic Head: Unifying Object Detection Heads with Attentions", CVPR 2021.

ResNet-50, 1x schedule, COCO val2017, percent. The row without any attention is the detector with its own towers, our
`baseline`; the tables have no row for a trunk of static blocks, our `none`.
"""

from ablations.rows.row import Settings

# Table 1: ATSS with every subset of the attentions. The depth is not printed; the LSC row equals Table 2's at 6 blocks.
SUBSETS_AP = {
    "baseline": 39.0,
    "L": 39.9,
    "S": 41.4,
    "C": 40.3,
    "LS": 41.9,
    "LC": 40.6,
    "SC": 42.0,
    "LSC": 42.6,
}
SUBSETS_DEPTH = 6

# Table 2: ATSS with LSC, AP by number of blocks.
DEPTHS_AP = {1: 36.7, 2: 39.5, 4: 42.0, 6: 42.6, 8: 42.5, 10: 42.3}

# Table 3: detectors with their own towers and with DyHead. It prints 39.4 for ATSS, whose baseline is 39.0 in Tables 1
# and 2; those two are the ablation that this project repeats, so `paper_ap` gives theirs.
DETECTORS_AP = {
    "atss": (39.4, 42.6),
    "retinanet": (35.7, 38.4),
    "fcos": (38.8, 40.0),
    "reppoints": (38.2, 39.6),
    "faster_rcnn": (36.4, 38.9),
}
DETECTORS_DEPTH = 6

SOURCE = "Dai et al., CVPR 2021, Tables 1 to 3: R-50, 1x, COCO val2017"
DETECTORS_SOURCE = f"Dai et al., CVPR 2021, Table 3: R-50 with {DETECTORS_DEPTH} blocks, 1x, COCO val2017"


def is_coco(cell: Settings) -> bool:
    """Whether a cell's data is COCO: its directory is called so (`coco`, `COCO2017`, `mscoco`, ...)."""
    return "coco" in str(cell.get("data", "")).lower()


def paper_ap(cell: Settings) -> float | None:
    """The paper's AP for a cell, or None where it prints none or the cell is another experiment (data, backbone).

    Example:
        >>> from ablations.rows.printed import paper_ap
        >>> cell = {"data": "coco", "backbone": "resnet50", "detector": "atss", "attentions": "LSC", "depth": 6}
        >>> paper_ap(cell)
        42.6
    """
    if not is_coco(cell) or cell.get("backbone") != "resnet50":
        return None
    detector, attentions, depth = cell["detector"], cell["attentions"], cell["depth"]
    if detector == "atss":
        if attentions == "LSC":
            return None if depth is None else DEPTHS_AP.get(depth)
        return SUBSETS_AP.get(attentions) if attentions == "baseline" or depth == SUBSETS_DEPTH else None
    without, with_dyhead = DETECTORS_AP.get(detector, (None, None))
    if attentions == "baseline":
        return without
    return with_dyhead if attentions == "LSC" and depth == DETECTORS_DEPTH else None
