"""JSON that nobody vouches for: bounded in size, parsed once, polygons kept as arrays from the start."""

import hashlib
import json
import stat
from pathlib import Path

from ablations.data.problems import DataError, quote
from ablations.data.segments import compact_polygons

# The largest official file, instances_train2017.json, has 0.45 GB.
MAX_JSON_BYTES = 4 << 30


def read_json(path: Path) -> tuple[object, str, list[str]]:
    """Parse a JSON file that nobody vouches for.

    Returns:
        The document, with polygons compacted; the SHA-256 of the file; and the keys that objects hold twice.

    Raises:
        DataError: The file is absent, unreadable, too large, not UTF-8, not JSON (with line and column) or too deep.
    """
    repeated: list[str] = []

    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 1000 else ["one of very many"]
            of = f" (id {quote(value['id'])})" if "id" in value else ""
            repeated.extend(f"an object{of} has the key {quote(key)} more than once" for key in twice)
        segmentation = value.get("segmentation")
        if type(segmentation) is list:
            value["segmentation"] = compact_polygons(segmentation)
        return value

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(path, ["is not a regular file"])
        if status.st_size > MAX_JSON_BYTES:
            raise DataError(path, [f"has {status.st_size} bytes; at most {MAX_JSON_BYTES} are read"])
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(path, ["no such file"]) from error
    except OSError as error:
        raise DataError(path, [f"cannot be read: {error.strerror}"]) from error
    digest = hashlib.sha256(content).hexdigest()
    try:
        text = content.decode(json.detect_encoding(content))
        del content
        document = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise DataError(path, [f"broken JSON at line {error.lineno} column {error.colno}: {error.msg}"]) from error
    except UnicodeDecodeError as error:
        raise DataError(path, [f"broken JSON: not UTF-8 text at byte {error.start}"]) from error
    except RecursionError as error:
        raise DataError(path, ["broken JSON: nested too deeply"]) from error
    except ValueError as error:
        # An integer of more digits than Python converts.
        raise DataError(path, [f"broken JSON: {error}"]) from error
    return document, digest, repeated
