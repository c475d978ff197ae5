"""`python -m condit_lab.world --out DIR`: fetch the pinned packages and build the world, with progress."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from condit_lab.world.build import build
from condit_lab.world.progress import Reporter


def main() -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m condit_lab.world", description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the world")
    parser.add_argument("--work", help="folder of packages and rasters (default: OUT/work); keeps a stopped build")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.monotonic()
    with Reporter() as report:
        world = build(options.out, work=options.work, progress=report)
    print(
        f"{len(world)} images, {len(world.concepts)} concepts, {len(world.styles)} styles in {options.out} "
        f"({time.monotonic() - started:.0f} s)",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
