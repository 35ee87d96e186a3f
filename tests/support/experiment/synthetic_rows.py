"""Rows as a grid would store them, with numbers from a formula instead of a training run."""

SUBSETS = ("none", "L", "S", "C", "LS", "LC", "SC", "LSC")
MACHINE = {
    "device": "Test CPU",
    "cores": 2,
    "driver": None,
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "command": "python -m ablations.run --grid",
}
GPU = {"device": "Test GPU", "cores": 16, "driver": "570.1"}


def synthetic_ap(attentions, depth, seed=0):
    """Additive effects of the letters, one interaction (L with S), a saturating depth and a little of the seed."""
    if attentions == "baseline":
        return 24.0 + 0.3 * seed
    letters = set(attentions) if attentions != "none" else set()
    gain = 1.0 * ("L" in letters) + 3.0 * ("S" in letters) + 1.5 * ("C" in letters) + 0.5 * ({"L", "S"} <= letters)
    return 20.0 + gain + 4.0 * (1 - 0.5 ** (depth - 1)) + 0.4 * seed


def make_row(attentions="LSC", depth=1, seed=0, status="ok", machine=None, cell=None, **changes):
    """One row; `cell` and `machine` change some of their fields."""
    depth = None if attentions == "baseline" else depth
    cell = {
        "data": "generated-tiny",
        "data_fingerprint": "f00d",
        "image_size": [128],
        "detector": "atss",
        "backbone": "tiny",
        "attentions": attentions,
        "depth": depth,
        "formulation": None if depth is None else "released",
        "coarse_offsets": "crop" if "S" in attentions else None,
        "placement": "trunk",
        "steps": 400,
        "lr": 0.04,
        "seed": seed,
        "precision": "fp32",
        "device_kind": "cpu",
        "backend": "auto",
    } | (cell or {})
    letters = 0 if attentions in ("baseline", "none") else len(attentions)
    blocks = depth or 0
    latency = 7.0 + blocks * (2.0 + 1.1 * letters) + 0.1 * seed
    row = {
        "key": "-".join(str(cell[name]) for name in ("detector", "attentions", "depth", "device_kind", "seed")),
        "cell": cell,
        "status": status,
        "reason": None if status == "ok" else "loss is nan at step 12",
        "machine": MACHINE | (machine or {}),
        "started": f"2026-01-01T00:{blocks:02d}:{letters:02d}+00:00",
        "finished": "2026-01-01T01:00:00+00:00",
    }
    if status == "ok":
        ap = synthetic_ap(attentions, depth, seed)
        row |= {
            "metrics": {"AP": ap, "AP50": ap + 20, "AP75": ap - 3, "APs": None, "APm": ap - 6, "APl": ap + 8},
            "params_M": 1.2 + 0.05 * blocks * (1 + letters),
            "GMACs": 0.3512 + 0.0213 * blocks,
            "images_per_s": 1000 / latency,
            "latency_ms_p50": latency,
            "latency_ms_p90": latency * 1.1,
            "peak_memory_MB": None,
            "batch_size_measured": 8,
            "threads": 1,
            "training": {"steps": 400, "images": 3200, "seconds": 30.0, "loss": 1.0},
        }
    return row | changes


def make_rows(depths=(1, 2), seeds=(0,), **changes):
    """Baseline and the eight subsets at some depths, for some seeds."""
    rows = [make_row("baseline", seed=seed, **changes) for seed in seeds]
    return rows + [make_row(subset, depth, seed, **changes) for depth in depths for subset in SUBSETS for seed in seeds]
