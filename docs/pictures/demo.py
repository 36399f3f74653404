"""Makes the pictures of the page on the demo: ``python docs/pictures/demo.py`` in a checkout.

They are what ``saccade demo --steps 2200`` draws on a GPU, with fewer pixels and colours. That takes about three
minutes; on a CPU the same command takes fewer scenes to a step. Or name the folder of such a run: ``python
docs/pictures/demo.py demo-output``. How well boxes are found, down to single ones, depends on how the machine rounds.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parent
WIDTH = 1200


def take(drawn: Path, into: Path = PICTURES) -> None:
    """Take the pictures that a run has drawn."""
    for name in ("cameras", "sampling"):
        picture = Image.open(drawn / f"{name}.png").convert("RGB")
        size = WIDTH, round(picture.height * WIDTH / picture.width)
        small = picture.resize(size, Image.Resampling.LANCZOS)
        # This method keeps colours that are rare, of dots and thin lines.
        small = small.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        small.save(into / f"demo_{name}.png", optimize=True)
    shutil.copyfile(drawn / "progress.gif", into / "demo_progress.gif")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drawn", nargs="?", type=Path, help="where `saccade demo` has drawn; by default it is run")
    drawn = parser.parse_args().drawn
    if drawn is not None:
        take(drawn)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--steps", "2200", "--out", folder]
            subprocess.run([sys.executable, "-m", "saccade", "demo", *options], check=True)
            take(Path(folder))
