"""Mask files: every kind becomes the right classes, and what does not fit is refused with its reason."""

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError
from beitzoo.images.files import ImageError
from beitzoo.images.label_maps import IGNORE, MaskError, MaskLabels, read_label_map, unknown_colours

NUMBERS = np.array([[0, 1, 2], [3, 2, 255]], dtype=np.uint8)
NAMES = ("sky", "road", "car", "tree")
COLOURS = {"sky": (9, 0, 0), "road": (0, 9, 0), "car": (0, 0, 9), "tree": (200, 100, 50)}


def saved(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    if mode == "P":
        image.quantize(16, dither=Image.Dither.NONE).save(path)
    else:
        (image if mode is None else image.convert(mode)).save(path)
    return path


def grey_png(path: Path, rows: list[list[int]], bits: int) -> Path:
    """Write a grey PNG of 1, 2 or 4 bits a pixel, by the format's own description."""
    packed = b""
    for row in rows:
        digits = "".join(f"{number:0{bits}b}" for number in row)
        packed += b"\0" + int(digits.ljust(8, "0"), 2).to_bytes(1, "big")
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


def message(mask: Path, labels: MaskLabels, size: tuple[int, int] | None = None) -> str:
    with pytest.raises(MaskError) as error:
        read_label_map(mask, labels, size)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("m.png", "uint8"), ("m.png", "uint16"), ("m.tif", "uint8"), ("m.tif", "uint16"), ("m.tif", "int32")],
)
def test_numbers_of_any_width_are_classes(tmp_path: Path, name: str, dtype: str) -> None:
    classes = read_label_map(saved(tmp_path / name, NUMBERS.astype(dtype)), MaskLabels(NAMES), (3, 2))
    assert classes.dtype == np.uint8
    assert classes.tolist() == NUMBERS.tolist()


def test_big_endian_16_bits(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (3, 2), NUMBERS.astype(">u2").tobytes())
    image.save(tmp_path / "m.tif")
    assert read_label_map(tmp_path / "m.tif", MaskLabels(NAMES)).tolist() == NUMBERS.tolist()


def test_of_a_palette_the_place_counts_and_not_the_colour(tmp_path: Path) -> None:
    image = Image.fromarray(NUMBERS).copy()
    image.putpalette([200, 0, 0, 200, 0, 0, 0, 7, 0, 1, 1, 1] + [0] * 756)  # two of one colour
    image.save(tmp_path / "m.png", transparency=0)
    with Image.open(tmp_path / "m.png") as written:
        assert written.mode == "P"
    assert read_label_map(tmp_path / "m.png", MaskLabels(NAMES)).tolist() == NUMBERS.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_not_scaled(tmp_path: Path, bits: int) -> None:
    rows = [[0, 1], [2**bits - 1, 1]]
    labels = MaskLabels(tuple(map(str, range(16))))
    assert read_label_map(grey_png(tmp_path / "m.png", rows, bits), labels).tolist() == rows


def test_zero_is_no_class_where_it_is_reduced(tmp_path: Path) -> None:
    mask = saved(tmp_path / "m.png", NUMBERS)
    classes = read_label_map(mask, MaskLabels(NAMES[:3], reduce_zero_label=True))
    assert classes.tolist() == [[IGNORE, 0, 1], [2, 1, IGNORE]]
    with_9 = saved(tmp_path / "9.png", np.where(NUMBERS == 3, 9, NUMBERS).astype(np.uint8))
    labels = MaskLabels(NAMES[:3], ignore=frozenset({9}))
    assert read_label_map(with_9, labels).tolist() == [[0, 1, 2], [IGNORE, 2, IGNORE]]
    assert pickle.loads(pickle.dumps(labels)) == labels


def test_numbers_out_of_range_are_named_and_counted(tmp_path: Path) -> None:
    pixels = np.array([[0, 1, 7], [7, 300, 65535]], dtype=np.uint16)
    reason = message(saved(tmp_path / "m.png", pixels), MaskLabels(NAMES))
    assert reason.startswith("numbers out of range: 7 (2 pixels), 300 (1 pixel), 65535 (1 pixel). ")
    assert "The 4 classes have the numbers 0 to 3, and 255 stands for no class" in reason
    negative = saved(tmp_path / "m.tif", np.array([[-1, 70000]], dtype=np.int32))
    assert "-1 (1 pixel), 70000 (1 pixel)" in message(negative, MaskLabels(NAMES))
    void = message(saved(tmp_path / "v.png", NUMBERS), MaskLabels(NAMES[:3]))
    assert void.endswith("If 3 stands for no class, add it to ignore; if 0 does, set reduce_zero_label")
    reduced = MaskLabels(NAMES[:2], reduce_zero_label=True)
    assert "3 (1 pixel). The 2 classes have the numbers 1 to 2" in message(tmp_path / "v.png", reduced)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_classes_by_their_table(tmp_path: Path, mode: str) -> None:
    pixels = np.array([[COLOURS["tree"], COLOURS["sky"]], [(1, 2, 3), COLOURS["car"]]], dtype=np.uint8)
    mask = saved(tmp_path / "m.png", pixels, mode)
    labels = MaskLabels(NAMES, colours=COLOURS)
    assert read_label_map(mask, labels).tolist() == [[3, 0], [IGNORE, 2]]
    assert unknown_colours(mask, labels) == {(1, 2, 3): 1}


def test_colours_agree_with_a_slow_search(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = {str(n): (int(r), int(g), int(b)) for n, (r, g, b) in enumerate(random.integers(0, 4, (40, 3)))}
    table = {name: colour for name, colour in table.items() if list(table.values()).count(colour) == 1}
    pixels = random.integers(0, 4, (20, 30, 3), dtype=np.uint8)
    labels = MaskLabels(tuple(table), colours=table)
    order = list(table.values())
    slow = [[order.index(tuple(p)) if tuple(p) in order else IGNORE for p in row] for row in pixels.tolist()]
    assert read_label_map(saved(tmp_path / "m.png", pixels), labels).tolist() == slow


def test_another_kind_of_mask_is_refused(tmp_path: Path) -> None:
    grey, rgb = saved(tmp_path / "l.png", NUMBERS), saved(tmp_path / "rgb.png", NUMBERS, "RGB")
    assert "numbers (8-bit grey), where colours are expected" in message(grey, MaskLabels(NAMES, colours=COLOURS))
    assert "colours (RGB), where numbers of classes are expected (all channels are equal" in message(
        rgb, MaskLabels(NAMES)
    )
    alpha = saved(tmp_path / "la.png", NUMBERS, "LA")
    assert "grey with transparency, where numbers" in message(alpha, MaskLabels(NAMES))
    fractions = saved(tmp_path / "f.tif", NUMBERS.astype(np.float32))
    assert "fractions" in message(fractions, MaskLabels(NAMES))


def test_files_that_do_not_keep_numbers_are_refused(tmp_path: Path) -> None:
    labels, image = MaskLabels(NAMES), Image.fromarray(NUMBERS)
    image.save(tmp_path / "m.jpg")
    assert "a JPEG file, which does not keep numbers" in message(tmp_path / "m.jpg", labels)
    image.save(tmp_path / "m.pgm")  # Pillow scales these by the largest number in their header
    assert "a PPM file; masks are PNG or TIFF" in message(tmp_path / "m.pgm", labels)
    image.save(tmp_path / "j.tif", compression="jpeg")
    assert "compressed as jpeg" in message(tmp_path / "j.tif", labels)
    image.save(tmp_path / "two.tif", save_all=True, append_images=[image])
    assert "several images" in message(tmp_path / "two.tif", labels)
    image.save(tmp_path / "w.tif", tiffinfo={262: 0})
    assert "WhiteIsZero" in message(tmp_path / "w.tif", labels)
    (tmp_path / "cut.png").write_bytes(saved(tmp_path / "m.png", NUMBERS).read_bytes()[:50])
    for name, reason in (("cut.png", "damaged"), ("none.png", "no such file")):
        with pytest.raises(ImageError, match=reason) as error:
            read_label_map(tmp_path / name, labels)
        assert not isinstance(error.value, MaskError)


def test_another_size_is_refused_and_never_resized(tmp_path: Path) -> None:
    mask = saved(tmp_path / "m.png", NUMBERS)
    assert message(mask, MaskLabels(NAMES), (6, 4)).startswith("it has 3 x 2 pixels and its image 6 x 4. Make")
    assert "before it was turned" in message(mask, MaskLabels(NAMES), (2, 3))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_mask_is_turned_as_its_own_notes_say(tmp_path: Path, dtype: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    Image.fromarray(NUMBERS.astype(dtype)).save(tmp_path / "m.png", exif=exif)
    classes = read_label_map(tmp_path / "m.png", MaskLabels(NAMES), (2, 3))
    assert classes.tolist() == np.rot90(NUMBERS, -1).tolist()


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        (("a",), {}, "2 to 255 classes"),
        (tuple(map(str, range(256))), {}, "2 to 255 classes"),
        (tuple(map(str, range(255))), {"reduce_zero_label": True}, "2 to 254 classes where number 0 stands for none"),
        (("a", " "), {}, "has no name"),
        (("a", "b", "a"), {}, r"Two classes are called \['a'\]"),
        (("a", "b"), {"ignore": frozenset({1})}, r"The number of \['b'\] is to be ignored"),
        (("a", "b"), {"ignore": frozenset({70000})}, "70000"),
        (("a", "b"), {"colours": {"a": (0, 0, 0)}}, "lacks b"),
        (("a", "b"), {"colours": {"a": (0, 0, 0), "b": (0, 0, 0)}}, "same colour"),
        (("a", "b"), {"colours": {"a": (0, 0, 0), "b": (0, 0, 256)}}, "from 0 to 255"),
        (("a", "b"), {"colours": {"a": (0, 0, 0), "b": (0, 0, 1), "c": (1, 1, 1)}}, "c, which is no class"),
        (("a", "b"), {"colours": {"a": (0, 0, 0), "b": (0, 0, 1)}, "reduce_zero_label": True}, "have no numbers"),
    ],
)
def test_labels_that_contradict_each_other(names: tuple[str, ...], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidValueError, match=reason):
        MaskLabels(names, **options)
