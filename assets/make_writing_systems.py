"""Pack train/CLASS and val/CLASS images and their LICENSE into writing_systems.zip, reproducibly.

    python assets/make_writing_systems.py FOLDER [OUT]

The images are five writing systems of Omniglot (https://github.com/brendenlake/omniglot, MIT):
drawers 01-16 in train, 17-20 in val.
"""

import sys
import zipfile
from pathlib import Path

KEEP = {".png"}


def pack(folder: Path, out: Path) -> int:
    """Write the zip and return the number of images in it."""
    images = sorted(path for path in folder.rglob("*") if path.suffix in KEEP)
    with zipfile.ZipFile(out, "w") as archive:
        for path in [folder / "LICENSE", *images]:
            # a fixed time, system and mode, so that packing twice gives equal files; PNG is
            # compressed already
            entry = zipfile.ZipInfo(
                path.relative_to(folder).as_posix(), date_time=(1980, 1, 1, 0, 0, 0)
            )
            entry.create_system = 3  # Unix
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return len(images)


if __name__ == "__main__":
    target = Path(__file__).with_name("writing_systems.zip")
    if len(sys.argv) > 2:
        target = Path(sys.argv[2])
    count = pack(Path(sys.argv[1]), target)
    print(f"{count} images, {target.stat().st_size:,} bytes in {target}")
