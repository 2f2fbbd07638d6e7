"""Odd, damaged and hostile image files, made on the spot."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# What each file must come to: an answer, a failure, or either (a flipped bit may or may not show).
Outcome = str
GOOD, BAD, ANY = "good", "bad", "any"

# Name, format, suffix and options of the writers whose files are cut and flipped.
WRITERS: tuple[tuple[str, str, str, dict[str, object]], ...] = (
    ("bmp", "BMP", "bmp", {}),
    ("gif", "GIF", "gif", {}),
    ("jpeg", "JPEG", "jpg", {}),
    ("progressive", "JPEG", "jpg", {"progressive": True}),
    ("png", "PNG", "png", {}),
    ("ppm", "PPM", "ppm", {}),
    ("tiff", "TIFF", "tiff", {}),
    ("lzw", "TIFF", "tif", {"compression": "tiff_lzw"}),
    ("webp", "WEBP", "webp", {}),
    ("lossless", "WEBP", "webp", {"lossless": True}),
)
# What Pillow could open as well, and does not here.
FOREIGN = ("ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "JPEG2000", "MSP", "XBM", "EPS", "PDF", "QOI")


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Draw noise over slopes, so that no two places look alike."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([x * 3 + y, x + y * 4, x * 2 + y * 2], axis=-1)
    return Image.fromarray(((slopes + rng.integers(0, 60, slopes.shape)) % 256).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def write_corpus(folder: Path) -> dict[Path, Outcome]:
    """Fill a folder; returns what must become of each file."""
    outcomes: dict[Path, Outcome] = {}
    for group in (cut, flipped, named_otherwise, modes, turned, frames, shapes, bombs, foreign):
        for name, (content, outcome) in group().items():
            path = folder / f"{group.__name__}-{name}"
            path.write_bytes(content)
            outcomes[path] = outcome
    return outcomes | no_files(folder)


Files = dict[str, tuple[bytes, Outcome]]


def cut() -> Files:
    """Cut every format off at the start, in its header, in its pixels and before its last bytes."""
    files: Files = {}
    for name, form, suffix, options in WRITERS:
        whole = encode(picture(), form, **options)
        files[f"{name}-whole.{suffix}"] = (whole, GOOD)
        for share in (0.0, 0.005, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
            files[f"{name}-{share}.{suffix}"] = (whole[: int(len(whole) * share)], BAD)
        files[f"{name}-last.{suffix}"] = (whole[:-1], ANY)
    return files


def flipped() -> Files:
    files: Files = {}
    for name, form, suffix, options in WRITERS:
        whole = encode(picture(), form, **options)
        for seed in range(6):
            content, place = bytearray(whole), random.Random(f"{name}{seed}").randrange(len(whole) if seed % 2 else 60)
            content[place] ^= 1 << (seed % 8)
            files[f"{name}-{seed}.{suffix}"] = (bytes(content), ANY)
    return files


def named_otherwise() -> Files:
    """Give files the names of other formats, or of none."""
    suffixes = ["png", "jpg", "gif", "bmp", "webp", "tiff", "ppm", "pgm", "PNG", "Jpeg"]
    pairs = zip(WRITERS, suffixes, strict=True)
    return {
        f"{name}.{suffix}": (encode(picture(), form, **options), GOOD) for (name, form, _, options), suffix in pairs
    }


def modes() -> Files:
    """Write what is not plain RGB of 8 bits."""
    sixteen = Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype("<u2"))
    palette = picture().quantize(16)
    ycck = bytearray(encode(picture(mode="CMYK"), "JPEG"))
    ycck[ycck.index(b"Adobe") + 11] = 2  # the colour transform of the Adobe segment
    broken_icc = {"icc_profile": b"\0\0\2\14no profile" * 20}
    return {
        **{f"{mode}.png": (encode(picture(mode=mode), "PNG"), GOOD) for mode in ("1", "L", "LA", "P", "RGBA")},
        "CMYK.jpg": (encode(picture(mode="CMYK"), "JPEG"), GOOD),
        "YCCK.jpg": (bytes(ycck), GOOD),
        "CMYK.tiff": (encode(picture(mode="CMYK"), "TIFF"), GOOD),
        "LAB.tiff": (encode(picture(mode="LAB"), "TIFF"), BAD),
        "16.png": (encode(sixteen, "PNG"), GOOD),
        "16.tiff": (encode(sixteen, "TIFF"), GOOD),
        "32.tiff": (encode(sixteen.convert("I"), "TIFF"), BAD),
        "float.tiff": (encode(sixteen.convert("F"), "TIFF"), BAD),
        "colour.png": (encode(palette, "PNG", transparency=3), GOOD),
        "colours.png": (encode(palette, "PNG", transparency=bytes(range(16))), GOOD),
        "RGBA.webp": (encode(picture(mode="RGBA"), "WEBP"), GOOD),
        "icc.jpg": (encode(picture(), "JPEG", **broken_icc), GOOD),
        "icc.png": (encode(picture(), "PNG", **broken_icc), GOOD),
        "exif.jpg": (encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), GOOD),
    }


def turned() -> Files:
    """Write all eight orientations, and one that does not exist, in the formats that can say so."""
    files: Files = {}
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tiff")):
            files[f"{orientation}.{suffix}"] = (encode(picture(), form, exif=exif), GOOD)
    return files


def frames() -> Files:
    """Write animations, pages and pairs, of which the first picture counts."""
    more = {"save_all": True, "append_images": [picture(40, 30).rotate(90 * turn) for turn in (1, 2)]}
    forms = (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tiff"), ("MPO", "jpg"))
    return {f"{form}.{suffix}": (encode(picture(), form, **more), GOOD) for form, suffix in forms}


def shapes() -> Files:
    sizes = ((1, 1), (1, 60_000), (60_000, 1), (2, 3), (3, 40_000), (7000, 2))
    return {
        f"{width}x{height}.{suffix}": (encode(picture(width, height), form), GOOD)
        for width, height in sizes
        for form, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"))
    }


def bombs() -> Files:
    """Write small files that say they are huge, and two that are."""
    huge = struct.pack(">II", 100_000, 100_000)
    small = {form: bytearray(encode(picture(), form)) for form in ("PNG", "GIF", "BMP", "JPEG", "TIFF", "PPM")}
    header = b"IHDR" + huge + bytes(small["PNG"][24:29])
    small["PNG"][12:33] = header + struct.pack(">I", zlib.crc32(header))
    small["GIF"][6:10] = b"\xff\xff\xff\xff"
    small["BMP"][18:26] = struct.pack("<ii", 100_000, 100_000)
    start = small["JPEG"].index(b"\xff\xc0")
    small["JPEG"][start + 5 : start + 9] = b"\xff\xdc\xff\xdc"
    tiff = bytes(small["TIFF"])
    for tag in (256, 257):  # width and height, as 32-bit numbers
        place = tiff.index(struct.pack("<HHI", tag, 4, 1))
        tiff = tiff[: place + 8] + struct.pack("<I", 100_000) + tiff[place + 12 :]
    small["TIFF"] = bytearray(tiff)
    small["PPM"] = bytearray(b"P6 100000 100000 255\n" + bytes(600))
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xfe\x3f\0" * 2  # 16,383 x 16,383
    webp = encode(picture(), "WEBP")[12:]
    webp = b"RIFF" + struct.pack("<I", 4 + len(vp8x) + len(webp)) + b"WEBP" + vp8x + webp
    scans = encode(Image.new("RGB", (2000, 1500), "blue"), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    files = {f"declared.{form.lower()}": (bytes(content), BAD) for form, content in small.items()}
    return {
        **files,
        "declared.webp": (webp, BAD),
        "white.png": (encode(Image.new("1", (9000, 9000), 1), "PNG"), BAD),
        "white.gif": (encode(Image.new("1", (9000, 9000), 1), "GIF"), BAD),
        "scans.jpg": (scans[:last] + 1000 * scans[last:-2] + scans[-2:], BAD),
        "text.png": (_png_with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000), 1)), ANY),
    }


def _png_with_chunk(name: bytes, content: bytes) -> bytes:
    whole = encode(picture(), "PNG")
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return whole[:33] + chunk + whole[33:]


def foreign() -> Files:
    """Write what Pillow or a browser would open by its content, under an image's name."""
    files: Files = {}
    for form in FOREIGN:
        mode = {"MSP": "1", "XBM": "1"}.get(form, "RGB")
        files[f"{form.lower()}.jpg"] = (encode(picture(64, 64, mode), form), BAD)
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3)
    return {
        **files,
        "psd.jpg": (header + bytes(12) + b"\0\0" + bytes(48), BAD),
        "fits.jpg": (b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800), BAD),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', BAD),
        "html.png": (b"<!DOCTYPE html><title>404</title>", BAD),
        "zeros.jpg": (bytes(5000), BAD),
        "noise.webp": (random.Random(0).randbytes(5000), BAD),
    }


def no_files(folder: Path) -> dict[Path, Outcome]:
    """Make what is in the place of a file and is none."""
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to("absent")
    (folder / "circle.png").symlink_to("circle.png")
    names = ("folder.png", "pipe.png", "device.png", "nowhere.png", "circle.png", "absent.png", "pipe.png/x.png")
    return {folder / name: BAD for name in names} | {folder / ("long" * 99 + ".png"): BAD}
