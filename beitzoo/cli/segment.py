"""The command segment."""

import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.cli.inputs import count_listed, find_listed
from beitzoo.cli.networks import fastest, load_segmenter
from beitzoo.cli.records import takes_records
from beitzoo.errors import InvalidValueError

if TYPE_CHECKING:
    from beitzoo.images.folders import LeftOut
    from beitzoo.images.overlays import PixelClasses
    from beitzoo.inference.label_files import Labelled
    from beitzoo.inference.segment import SegmentOptions
    from beitzoo.models.segmentation import Segmenter

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

_NAMED_IN_SUMMARY = 3  # classes


class Mode(StrEnum):
    """How an image is looked at."""

    SLIDE = "slide"
    WHOLE = "whole"


@dataclass(frozen=True)
class Looking:
    """How a segmentation model looks at images; see `inference.segment.SegmentOptions`.

    Attributes:
        mode: Window by window, or the whole image at once.
        short_side: Shorter side that images are resized to.
        stride: Pixels from one window to the next.
        scales: Factors of that size, with commas.
        flip: Look at the mirrored image too.
    """

    mode: Annotated[Mode, typer.Option(help="Window by window, or the whole image at once.")] = Mode.SLIDE
    short_side: Annotated[
        int | None, typer.Option(min=0, help="Resize the shorter side to it; the network's by default, 0: as it is.")
    ] = None
    stride: Annotated[
        int | None, typer.Option(min=1, help="Pixels from window to window; two thirds of the window by default.")
    ] = None
    scales: Annotated[str, typer.Option(help="Sizes to average over, such as 0.75,1,1.25.")] = "1"
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False

    @property
    def options(self) -> "SegmentOptions":
        """As the model takes them.

        Raises:
            InvalidValueError: Scales are no numbers, or one is out of range.
        """
        from beitzoo.inference.segment import SegmentOptions

        try:
            scales = tuple(float(scale) for scale in self.scales.split(","))
        except ValueError:
            raise InvalidValueError(
                f"--scales {self.scales}: these are no numbers; give factors with commas, such as 0.75,1,1.25."
            ) from None
        return SegmentOptions(
            mode=self.mode.value, short_side=self.short_side, stride=self.stride, scales=scales, flip=self.flip
        )


@takes_records
def segment(
    images: Annotated[
        list[str],
        typer.Argument(help="Files, folders or globs; '-' reads files and folders from stdin, a line each."),
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Segmentation model: a name, a folder or a run.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of your own, a file; --model then says of which network they are.")
    ] = None,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Draw pictures for people.")] = True,
    looking: Looking = Looking(),
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 2,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    optimized: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="On a CPU, let the optimized copy compute many images.")
    ] = True,
) -> None:
    """Name the class of each pixel of images.

    Into --out go labels/NAME.png, the classes by number with a palette; overlays/NAME.jpg, the image under their
    colours with a legend; and shares.csv, a row for each class in each image. NAME is the image's path below the
    folder or glob that named it, and gets a number where it is taken. An image that cannot be read is listed, and is a
    row with the reason; the exit code is then 1.
    """
    from beitzoo.images.folders import LeftOut
    from beitzoo.inference.fastest import HANDFUL, WINDOWS, count_ahead
    from beitzoo.inference.label_files import LabelFiles, check_folder, open_shares
    from beitzoo.inference.segment import segment_each
    from beitzoo.measure.options import usable_device
    from beitzoo.progress import watch

    options = looking.options
    out = check_folder(out)
    _, network = load_segmenter(model, checkpoint, usable_device(device))
    classes = _classes(network)
    left_out, names = LeftOut(), _Named()
    paths: Iterable[Path] = names.paths(find_listed(images, left_out))
    # What is listed on stdin may come slowly, so nobody waits to count it.
    count, paths = (HANDFUL + 1, paths) if "-" in images else count_ahead(paths)
    (faster,) = fastest([network], count, WINDOWS, optimized)
    segmentations = segment_each(faster, paths, options, workers=workers)
    tally = _Tally()
    with warnings.catch_warnings(), open_shares(out) as shares:
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        files = LabelFiles(out, classes, shares, overlays)
        written = files.write_all((one, names.next()) for one in segmentations)
        for labelled in watch(written, "image", count_listed(images)):
            tally.add(labelled)
    tally.summarise(out, classes, left_out)


class _Named:
    """Passes paths on and keeps the names of their files until the outcomes come, in the same order."""

    def __init__(self) -> None:
        from beitzoo.inference.label_files import Names

        self.names = Names()
        self.waiting: deque[Path] = deque()

    def paths(self, found: Iterable[tuple[str, Path]]) -> Iterator[Path]:
        for place, path in found:
            self.waiting.append(self.names.take(path, place))
            yield path

    def next(self) -> Path:
        return self.waiting.popleft()


def _classes(network: "Segmenter") -> "PixelClasses":
    """Return names and colours of a model's classes; where nobody named them, they are called by their numbers."""
    from beitzoo.images.overlays import PixelClasses
    from beitzoo.zoo.colours import class_colours

    count = network.num_classes
    names = network.class_names or tuple(map(str, range(count)))
    return PixelClasses(names, tuple(class_colours(network.class_names, count)))


class _Tally:
    """Counts what was written, and remembers what was not."""

    def __init__(self) -> None:
        self.images = 0
        self.failed: list[tuple[Path, str]] = []
        self.shares: Counter[int] = Counter()

    def add(self, labelled: "Labelled") -> None:
        self.images += 1
        if labelled.error is not None:
            self.failed.append((labelled.path, labelled.error))
        self.shares.update(dict(labelled.counts))

    def summarise(self, out: Path, classes: "PixelClasses", left_out: "LeftOut") -> None:
        """Say what was written, and on stderr what was not; exit with 1 if there was nothing, or something failed."""
        from beitzoo.inference.rows import printable

        done = self.images - len(self.failed)
        if done:
            print(f"{done:,} image{'s' * (done != 1)} in {out}. Most pixels: {self._largest(classes.names)}.")
        for line in [*left_out.describe(), *(f"{path}: {reason}" for path, reason in self.failed)]:
            print(printable(line), file=sys.stderr)
        if not self.images:
            print("There were no images: nothing was listed on stdin.", file=sys.stderr)
        elif self.failed:
            print(f"No label map of {len(self.failed):,} of {self.images:,} images.", file=sys.stderr)
        if self.failed or not self.images:
            raise typer.Exit(1)

    def _largest(self, names: Sequence[str]) -> str:
        total = self.shares.total()
        largest = self.shares.most_common(_NAMED_IN_SUMMARY)
        return ", ".join(f"{names[number]} ({pixels / total:.1%})" for number, pixels in largest)
