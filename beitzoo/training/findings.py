"""What is said of labelled images before a run: sizes of classes, files that cannot be read, near duplicates."""

from beitzoo.errors import some_of
from beitzoo.images.duplicates import hash_images, near_duplicates
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split

# Classes whose sizes are listed; and how much larger the largest may be before that is worth a word.
_MOST_LISTED, _UNEVEN = 12, 5
# Images are opened before a run where there are so many at most: a few seconds of photographs.
_MOST_OPENED = 3000


def describe_classes(images: ImageSet, split: Split) -> list[str]:
    """Say how many images of each class there are to train on, whether that is uneven, and what is not measured."""
    trained, held_out = (images.class_sizes(part) for part in (split.train, split.test))
    sizes = [(images.names[label], count) for label, count in trained.most_common()]
    listed = ", ".join(f"{name} {count:,}" for name, count in sizes[:_MOST_LISTED])
    lines = [f"Images to train on: {listed}{', ...' * (len(sizes) > _MOST_LISTED)}"]
    (most, many), (fewest, few) = sizes[0], sizes[-1]
    more = "task.balance=sampling shows rare classes more often"
    if images.label_sets is not None:
        more = "task.balance=loss weighs images that have a rare label more"
    if many >= _UNEVEN * few:
        lines.append(
            f"The classes are uneven: {most} has {many / few:.0f} times as many images as {fewest}. --set {more}."
        )
    unmeasured = [name for label, name in enumerate(images.names) if not held_out[label]]
    if unmeasured and images.labels is not None:  # of several labels each it is said what the mean is of
        lines.append(
            f"Without a held-out image, so that nothing is measured of them: {', '.join(unmeasured[:_MOST_LISTED])}"
            f"{', ...' * (len(unmeasured) > _MOST_LISTED)}"
        )
    return lines


def look_at_images(images: ImageSet, split: Split) -> list[str]:
    """Open all images, where they are few enough, and say which cannot be read and which are near duplicates."""
    indices = [*split.train, *split.val, *split.test]
    if len(indices) > _MOST_OPENED:
        return [
            f"Of more than {_MOST_OPENED:,} images it is not looked beforehand which cannot be read, nor for near "
            "duplicates."
        ]
    unreadable = _Unreadable()
    hashes = hash_images(images, indices, unreadable)
    return [
        *unreadable.describe(),
        *unreadable.describe_classes(images, split),
        *_describe_duplicates(images, near_duplicates(images, hashes, split), split),
    ]


class _Unreadable(LeftOut):
    """Images that cannot be read, all by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def add(self, reason: str, name: str) -> None:
        super().add(reason, name)
        self.names.add(name)

    def describe_classes(self, images: ImageSet, split: Split) -> list[str]:
        """Warn of classes of which most images to train on are damaged: they were counted by their files."""
        sizes = images.class_sizes(split.train)
        left = images.class_sizes(index for index in split.train if images.identity(index)[0] not in self.names)
        damaged = [
            f"{images.names[label]} ({left[label]:,} of {size:,})"
            for label, size in sorted(sizes.items())
            if 2 * left[label] < size
        ]
        if not damaged:
            return []
        return [f"Few images to train on can be read of these classes: {some_of(damaged)}. Replace the files."]


def _describe_duplicates(images: ImageSet, pairs: list[tuple[int, int]], split: Split) -> list[str]:
    if not pairs:
        return []
    names = " and ".join(images.identity(index)[0] for index in pairs[0])
    found = len({held_out for _, held_out in pairs})
    return [
        f"{found:,} of {len(split.test):,} held-out images look almost like one to train on, such as {names}: a model "
        "may know these by heart."
    ]
