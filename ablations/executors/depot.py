"""The actor beside the driver of a grid on a cluster: what tasks tell, and the files of their cells.

It imports nothing that computes, so that it begins at once and takes little memory.
"""

from pathlib import Path

from ablations.files import atomic_write_bytes


class Depot:
    """Events on their way to the driver, and the files of cells.

    Args:
        out: The driver's directory of results.
    """

    def __init__(self, out: Path):
        self.out = out
        self.events: list[tuple[int, bytes]] = []

    def tell(self, number: int, event: bytes) -> None:
        """Take an event, pickled, of the cell of this number."""
        self.events.append((number, event))

    def take(self) -> list[tuple[int, bytes]]:
        """The events since this was last called."""
        events, self.events = self.events, []
        return events

    def put(self, folder: str, name: str, content: bytes) -> None:
        """Write a file of `cells/<folder>/`."""
        path = self.out / "cells" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, content)

    def get(self, folder: str) -> dict[str, bytes]:
        """The files of `cells/<folder>/` by name."""
        return {path.name: path.read_bytes() for path in whole_files(self.out / "cells" / folder)}


def whole_files(folder: Path) -> list[Path]:
    """The files of a folder, without what is being written."""
    return [path for path in folder.glob("*") if path.is_file() and not path.name.startswith(".")]
