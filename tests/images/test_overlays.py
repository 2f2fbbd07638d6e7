"""Label maps as pictures: numbers survive, colours are those of the classes, legends are true."""

import io

import numpy as np
import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError
from beitzoo.images import overlays
from beitzoo.images.label_maps import IGNORE
from beitzoo.images.overlays import PixelClasses, count_pixels, cover, legend, overlay, palette_image
from beitzoo.zoo.colours import class_colours

THREE = PixelClasses(("sky", "tree", "road"), ((0, 0, 255), (0, 255, 0), (255, 0, 0)))


def test_palette_image_reads_back_as_the_same_numbers() -> None:
    classes = PixelClasses(tuple(map(str, range(255))), tuple(class_colours(None, 255)))
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    palette_image(labels, classes).save(file, "PNG")
    with Image.open(file) as image:
        assert image.mode == "P"
        assert (np.array(image) == labels).all()
        rgb = np.array(image.convert("RGB")).reshape(256, 3)
    assert [tuple(colour) for colour in rgb[:255].tolist()] == list(classes.colours)
    assert rgb[IGNORE].tolist() == [0, 0, 0]
    with Image.open(_saved(palette_image(labels[:1, :2], THREE))) as few:  # no bits are saved on few colours
        assert np.array(few).tolist() == [[0, 1]]


def _saved(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file


def test_pixels_are_counted_most_first() -> None:
    labels = np.array([[2, 2, 2], [IGNORE, 0, IGNORE]], dtype=np.uint8)
    assert count_pixels(labels, THREE) == [(2, 3), (IGNORE, 2), (0, 1)]
    with pytest.raises(InvalidValueError, match="has the numbers 3, 7, and there are 3 classes"):
        count_pixels(np.array([[0, 3, 7]], dtype=np.uint8), THREE)


def test_cover_has_full_colours_at_edges_and_leaves_what_has_no_class() -> None:
    labels = np.zeros((8, 8), dtype=np.uint8)
    labels[:, 4:] = 2
    labels[6:] = IGNORE
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    covered = np.array(cover(grey, labels, THREE))
    assert covered[0, [3, 4]].tolist() == [[0, 0, 255], [255, 0, 0]]
    assert covered[0, 0].tolist() == [40, 40, 193]  # 0.6 of the colour
    assert (covered[6:] == 100).all()
    assert np.array(cover(grey.resize((40, 24)), labels, THREE)).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((1, 1), (512, 512)), ((448, 299), (896, 598)), ((900, 600), (900, 600)), ((3200, 1600), (1600, 800)),
     ((1, 5000), (1, 1600)), ((5000, 1), (1600, 1))],
)  # fmt: skip
def test_images_are_shown_so_that_their_legend_can_be_read(size: tuple[int, int], shown: tuple[int, int]) -> None:
    labels = np.ones(size[::-1], dtype=np.uint8)
    picture = overlay(Image.new("RGB", size), labels, THREE)
    green = (np.array(picture) == (0, 0.6 * 255, 0)).all(axis=2)
    rows, columns = np.flatnonzero(green.any(axis=1)), np.flatnonzero(green.any(axis=0))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == shown
    assert min(picture.size) > 50  # there is room for the legend


def test_overlay_wants_one_size() -> None:
    with pytest.raises(InvalidValueError, match="An image of 4 x 3 pixels and a label map of 3 x 4"):
        overlay(Image.new("RGB", (4, 3)), np.zeros((4, 3), dtype=np.uint8), THREE)


def test_legend_names_the_largest_and_sums_up_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str]] = []
    line = overlays._line

    def listen(entry: overlays._Entry, width: int, size: int) -> Image.Image:
        written.append((entry.name, f"{entry.share:.3f}"))
        return line(entry, width, size)

    monkeypatch.setattr(overlays, "_line", listen)
    classes = PixelClasses(tuple(f"n{number}" for number in range(40)), tuple(class_colours(None, 40)))
    strip = legend([(0, 61), *((number, 1) for number in range(1, 40))], classes, 14, width=900)
    assert strip.width <= 900
    assert written[:2] == [("n0", "0.610"), ("n1", "0.010")]
    assert written[-1] == ("and 17 more", "0.170")
    assert len(written) == 24
    written.clear()
    assert legend([(0, 61), *((number, 1) for number in range(1, 40))], classes, 14, 250, height=100).height <= 100
    assert written[-1][0].endswith("more")


def test_names_that_the_font_lacks_are_still_told_apart() -> None:
    names = ("Straße", "道路", " ", "café", "Łódź", "a" * 400)
    classes = PixelClasses(names, tuple(class_colours(None, len(names))))
    drawn = [overlays._name(number, classes) for number in range(len(names))]
    assert drawn == ["Strasse", "class 1", "class 2", "cafe", "Lodz", "a" * 400]
    assert legend([(5, 1)], classes, 14, width=300).width <= 300
