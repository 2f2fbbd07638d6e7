"""The Sign Language Digits data set in parts for training, choosing and testing that have no person in common.

`python tests/baselines/sign_digits_parts.py DATASET OUT` puts links to the photographs of DATASET, which has a folder
for each digit, into OUT/train, OUT/val and OUT/test. Photographs of a person are neighbours in number,
so that parts are ranges of numbers, the same in all classes, with a gap of about three people between them.
"""

import argparse
from collections import Counter
from pathlib import Path

PARTS = {"train": range(5231), "val": range(5261, 5421), "test": range(5451, 10000)}


def part_of(name: str) -> str | None:
    """Return the part of a photograph, IMG_1234.JPG; None for one in a gap."""
    number = int(Path(name).stem.removeprefix("IMG_"))
    return next((part for part, numbers in PARTS.items() if number in numbers), None)


def link_parts(data_set: Path, out: Path) -> Counter[str]:
    """Make the links, where they are not there yet; return how many photographs each part has."""
    counts: Counter[str] = Counter()
    for photograph in sorted(data_set.absolute().glob("[0-9]/IMG_*.JPG")):
        part = part_of(photograph.name)
        if part is not None:
            link = out / part / photograph.parent.name / photograph.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(photograph)
            counts[part] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_set", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(dict(link_parts(options.data_set, options.out)))
