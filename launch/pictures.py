"""Cuts the photographs that two Python packages carry into small pictures with captions, for `launch/demo.sh --pictures`.

    python launch/pictures.py OUT

Needs what launch/requirements/pictures.txt pins. Each photograph is made so small that its shorter side has SIDE pixels, and cut
into squares of CROP pixels, as it is and mirrored: OUT gets `cat-0-12.png`, its caption in `cat-0-12.txt`, and LICENCES.txt.
"""

import importlib.util
import sys
from pathlib import Path

from PIL import Image, ImageOps

SIDE, CROP, STRIDE = 72, 64, 8

# Photographs by package: file, caption, author and licence, as the package's own pages tell them.
PHOTOGRAPHS = {
    "skimage": [
        ("data/astronaut.png", "an astronaut", "NASA, of Eileen Collins; public domain"),
        ("data/chelsea.png", "a cat", "Stefan van der Walt; CC0"),
        ("data/coffee.png", "a cup of coffee", "Rachel Michetti; CC0"),
        ("data/rocket.jpg", "a rocket", "SpaceX; public domain"),
        ("data/hubble_deep_field.jpg", "galaxies", "NASA, by the Hubble telescope; public domain"),
        ("data/brick.png", "a brick wall", "CC0Textures; CC0"),
    ],
    "sklearn": [
        ("datasets/images/china.jpg", "a temple", "danielbuechele; CC BY 2.0"),
        ("datasets/images/flower.jpg", "a flower", "vultilion; CC BY 2.0"),
    ],
}


def folder_of(package: str) -> Path:
    """The package's folder, without running any of it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{package} is not installed: launch/requirements/pictures.txt pins it")
    return Path(found.submodule_search_locations[0])


def reduced(path: Path) -> Image.Image:
    photograph = Image.open(path).convert("RGB")
    factor = SIDE / min(photograph.size)
    size = [round(length * factor) for length in photograph.size]
    return photograph.resize(size, Image.Resampling.LANCZOS)


def crops(photograph: Image.Image) -> dict[str, Image.Image]:
    """Squares by a name for each."""
    found = {}
    for top in range(0, photograph.height - CROP + 1, STRIDE):
        for left in range(0, photograph.width - CROP + 1, STRIDE):
            square = photograph.crop((left, top, left + CROP, top + CROP))
            found[f"{top}-{left}"] = square
            found[f"{top}-{left}-mirrored"] = ImageOps.mirror(square)
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out, licences = Path(sys.argv[1]), []
    out.mkdir(parents=True)
    for package, photographs in PHOTOGRAPHS.items():
        for file, caption, licence in photographs:
            path = folder_of(package) / file
            licences.append(f"{path.name}, of {package}: {licence}\n")
            for place, square in crops(reduced(path)).items():
                name = out / f"{path.stem}-{place}"
                square.save(name.with_suffix(".png"))
                name.with_suffix(".txt").write_text(caption + "\n")
    (out / "LICENCES.txt").write_text("".join(licences))
    print(f"    {len(list(out.glob('*.png')))} pictures of {CROP} x {CROP} pixels in {out}")


if __name__ == "__main__":
    main()
