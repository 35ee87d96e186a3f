"""Stand-in until the room of evaluation is merged."""

import gzip
import json
from pathlib import Path
from typing import Any


def read_detections(path: Path) -> list[dict[str, Any]]:
    """A list of detections in COCO's results format."""
    return json.loads(gzip.decompress(path.read_bytes()))
