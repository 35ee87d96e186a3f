"""Write this package's operators in the layout of Hugging Face's Kernel Hub.

    python -m kernels.bench.hub OUT [--owner NAME]

OUT has a variant for CPUs, one for CUDA and one for ROCm under build/, each with its metadata and the modules that its
operators need, and build.toml and README.md beside. Nothing is uploaded. An OUT that this program has written is
written anew; one with other files in it is refused.
"""

import argparse
import sys
from pathlib import Path

from kernels.bench.hub.layout import NAME, VARIANTS, write


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 written, 2 refused."""
    parser = argparse.ArgumentParser("python -m kernels.bench.hub", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder, or one that this has written")
    parser.add_argument("--owner", metavar="NAME", help=f"the card and build.toml refer to NAME/{NAME} on the Hub")
    options = parser.parse_args(arguments)
    try:
        files = write(options.out, options.owner)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(files)} files, {', '.join(VARIANTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
