"""Stand-in until the room of the evaluation is merged."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "cls", "loc", "both", "dup", "bkg", "miss")


def write_replicates(path: str | Path, replicates: NDArray[np.float32]) -> None:
    """Write (B, len(NAMES)) percent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, replicates=replicates)


def read_replicates(path: str | Path) -> NDArray[np.float32] | None:
    """Read them; None where there are none."""
    if not Path(path).exists():
        return None
    with np.load(path) as stored:
        found: NDArray[np.float32] = stored["replicates"]
    return found
