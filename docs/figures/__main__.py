"""Draws the pictures of the documentation:  python docs/figures [--output FOLDER] [NAME ...]

gradient, jacobians and corners come from the reference; ring from a model of links; accuracy from every installed
backend; maps trains a model for a minute; speed measures this machine. measure_ring.py beside them prints a table.
"""

import argparse
from pathlib import Path

from accuracy import accuracy
from corners import corners
from gradient import gradient, jacobians
from maps import maps
from rich.progress import track
from ring import ring
from speed import speed

PICTURES = {each.__name__: each for each in (gradient, jacobians, corners, ring, accuracy, maps, speed)}


def main(argv: list[str] | None = None) -> None:
    """Draw the pictures that the command line names."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(PICTURES)}; all by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "pictures", help="a folder")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"no picture is named {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in track(args.names or list(PICTURES), description="pictures"):
        PICTURES[name](args.output / f"{name}.png")


if __name__ == "__main__":
    main()
