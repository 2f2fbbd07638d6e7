"""Visual tokens computed once: seeded views of each image and their ids, in files that are mapped into memory.

A folder holds `manifest.json`, `samples.npy` with the numbers of the images, and `00000.npy`, `00001.npy`, …: the views
of so many images each, arrays (images, views) of records. A record has the crop box, the flip, the changes of colour
and the ids; at 14 x 14 patches these are 44 and 392 bytes. An image that could not be read has records of zeros.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from beitzoo.errors import InvalidValueError, MissingFileError, check
from beitzoo.files import full_path, read_text, write_atomically, write_text
from beitzoo.images.augment import COLOURS, TwoViews, View
from beitzoo.images.files import ImageError
from beitzoo.images.image_set import ImageSet
from beitzoo.zoo.checkpoints import Interpolation
from beitzoo.zoo.networks import Pair

Records = NDArray[np.void]

MANIFEST, SAMPLES = "manifest.json", "samples.npy"
_AGAIN = "make the tokens again with `beitzoo tokenize`"


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewSettings(_Closed):
    """The fields of `TwoViews` that views and ids depend on; those of the network's view are not among them."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    jitter: float
    hflip: float
    token_size: Pair
    token_interpolation: Interpolation

    @classmethod
    def of(cls, views: TwoViews) -> Self:
        """Return those of a transform."""
        return cls(**{name: getattr(views, name) for name in cls.model_fields})


class TokenRequest(_Closed):
    """What tokens are of: a folder that is not finished goes on with the same, and training uses no other.

    Attributes:
        tokenizer: Its name.
        weights: Checksum of its weights.
        vocab_size: Codes of its codebook.
        grid: Rows and columns of ids.
        settings: How views are drawn, and how the tokenizer's is resized.
        seed: View k of sample s is drawn by `sample_generator(seed, k, s)`, as epoch k of a run with that seed does.
        views: Views of each image.
        images: Images that have views.
        identities: Digest of which images these are; see `digest_of`.
        chunk: Images of a file.
    """

    format: Literal[1] = 1
    tokenizer: str
    weights: str
    vocab_size: int
    grid: Pair
    settings: ViewSettings
    seed: int
    views: int
    images: int
    identities: str
    chunk: int

    @property
    def chunks(self) -> list[str]:
        """Names of all files with records."""
        return [f"{number:05}.npy" for number in range(-(-self.images // self.chunk))]

    @property
    def record_type(self) -> np.dtype[np.void]:
        """How a view is stored; a colour is its place in `COLOURS` from 1 on, and 0 for none."""
        ids = "<u2" if self.vocab_size <= 2**16 else "<u4"
        colours = [("colours", "u1", (len(COLOURS),)), ("factors", "<f8", (len(COLOURS),))]
        return np.dtype([("box", "<u4", (4,)), ("flip", "?"), *colours, ("ids", ids, self.grid)])


class UnreadableImage(_Closed):
    """An image without tokens, and the reason."""

    sample: int
    name: str
    reason: str


class Manifest(_Closed):
    """What a folder holds so far.

    Attributes:
        request: What its tokens are of.
        files: sha256 of each file that is written; all of them when it is finished.
        unreadable: Images of these files that could not be read.
    """

    request: TokenRequest
    files: dict[str, str] = {}
    unreadable: tuple[UnreadableImage, ...] = ()


def digest_of(images: ImageSet, samples: Sequence[int]) -> str:
    """Return the sha256 of which images some samples are: their numbers, names and sizes (`ImageSet.identity`)."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update("\t".join([str(int(sample)), *images.identity(int(sample))]).encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


class TokenViews:
    """The views and visual tokens in a finished folder. It pickles to a few bytes for each image.

    Attributes:
        folder: Where they are.
        request: What they are of.
        unreadable: Images without tokens, with the reasons.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.request = manifest.request
        self.unreadable = manifest.unreadable
        self._reasons = {one.sample: one.reason for one in manifest.unreadable}
        self._samples: NDArray[np.int64] = np.load(folder / SAMPLES)
        self._chunks: dict[str, Records] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a folder that `beitzoo tokenize` finished; every file is compared with its checksum.

        Raises:
            MissingFileError: There is none.
            InvalidValueError: It is not finished, damaged, or of another version.
        """
        folder = full_path(folder)
        if not (folder / MANIFEST).is_file():
            raise MissingFileError(f"{folder} has no {MANIFEST}, so it holds no tokens; {_AGAIN}.")
        manifest = _read_manifest(folder)
        missing = [name for name in (SAMPLES, *manifest.request.chunks) if name not in manifest.files]
        check(
            not missing,
            f"The tokens in {folder} are not finished, {len(missing):,} files are missing; the same command goes on.",
        )
        for name, checksum in manifest.files.items():
            check(
                _checksum(folder / name) == checksum,
                f"{folder / name} is damaged; the command that made it makes it again.",
            )
        return cls(folder, manifest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": {}}  # other processes map the files themselves

    def view(self, sample: int, number: int) -> tuple[View, Tensor]:
        """Return a view of an image and its ids (h, w), int64.

        Args:
            sample: Number of the image.
            number: Of the view; after the last one comes the first one again, so an epoch may be given.

        Raises:
            ImageError: The image could not be read.
            InvalidValueError: It has no tokens here.
        """
        if sample in self._reasons:
            raise ImageError(self._reasons[sample])
        place = int(np.searchsorted(self._samples, sample))
        if place == len(self._samples) or self._samples[place] != sample:
            raise InvalidValueError(f"Image {sample} has no tokens in {self.folder}; {_AGAIN}.")
        chunk, row = divmod(place, self.request.chunk)
        record = self._mapped(self.request.chunks[chunk])[row, number % self.request.views]
        return _view_of(record), torch.from_numpy(record["ids"].astype(np.int64))

    def views(self, sample: int) -> list[tuple[View, Tensor]]:
        """Return all views of an image with their ids; see `view`."""
        return [self.view(sample, number) for number in range(self.request.views)]

    def check(self, images: ImageSet, samples: Sequence[int], views: TwoViews, vocab_size: int) -> None:
        """Refuse to be used where the tokens are not those that would be computed.

        Args:
            images: The data set.
            samples: The images of it that tokens are needed for.
            views: How views are drawn there; the network's may be of any size.
            vocab_size: Codes that are told apart there.

        Raises:
            InvalidValueError: Says what differs.
        """
        wanted, settings = ViewSettings.of(views), self.request.settings
        difference = _first_difference(settings, wanted)
        check(not difference, f"The views in {self.folder} are others: {difference}. Set the same, or {_AGAIN}.")
        check(
            vocab_size == self.request.vocab_size,
            f"The tokens in {self.folder} are of {self.request.tokenizer} with {self.request.vocab_size:,} codes, and "
            f"{vocab_size:,} are wanted; set the same tokenizer, or {_AGAIN}.",
        )
        numbers = self._samples.tolist()
        check(
            numbers[-1] < len(images.images) and digest_of(images, numbers) == self.request.identities,
            f"The tokens in {self.folder} are of other images than these; give the same data, or {_AGAIN}.",
        )
        missing = len(set(samples) - set(numbers))
        check(not missing, f"{missing:,} of these images have no tokens in {self.folder}; {_AGAIN} for them.")

    def _mapped(self, name: str) -> Records:
        if name not in self._chunks:
            self._chunks[name] = np.load(self.folder / name, mmap_mode="r")
        return self._chunks[name]


class TokenWriter:
    """Writes a folder chunk by chunk, each atomically. What was written before is kept if it is of the same request.

    Args:
        folder: Receives the files.
        request: What its tokens are of.
        samples: Numbers of the images, ascending.

    Raises:
        InvalidValueError: The folder holds other tokens.
    """

    def __init__(self, folder: str | Path, request: TokenRequest, samples: Sequence[int]) -> None:
        self.folder = full_path(folder)
        self.request = request
        self.samples = samples
        self._manifest = Manifest(request=request)
        if (self.folder / MANIFEST).is_file():
            self._keep(_read_manifest(self.folder))
        if SAMPLES not in self._manifest.files:
            self.write(SAMPLES, np.asarray(samples, dtype=np.int64))

    def missing(self) -> Iterator[tuple[str, Sequence[int]]]:
        """Yield each file of records that is not there yet, and the samples that it is of."""
        for name in self.request.chunks:
            if name not in self._manifest.files:
                yield name, self._samples_of(name)

    def write(self, name: str, array: NDArray[Any], unreadable: Sequence[UnreadableImage] = ()) -> None:
        """Write a file, such as one of records (images, views), and note which of its images have none."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, array)

        write_atomically(self.folder / name, write)
        self._manifest = Manifest(
            request=self.request,
            files={**self._manifest.files, name: str(_checksum(self.folder / name))},
            unreadable=(*self._manifest.unreadable, *unreadable),
        )
        write_text(self.folder / MANIFEST, self._manifest.model_dump_json(indent=1) + "\n")

    def _keep(self, found: Manifest) -> None:
        """Go on with what is there, but for damaged files."""
        difference = _first_difference(found.request, self.request)
        check(not difference, f"{self.folder} holds other tokens: {difference}. Choose another folder with --out.")
        files = {name: checksum for name, checksum in found.files.items() if _checksum(self.folder / name) == checksum}
        kept = {sample for name in files for sample in self._samples_of(name)}
        unreadable = tuple(one for one in found.unreadable if one.sample in kept)
        self._manifest = Manifest(request=self.request, files=files, unreadable=unreadable)

    def _samples_of(self, name: str) -> Sequence[int]:
        if name == SAMPLES:
            return ()
        number = self.request.chunks.index(name)
        return self.samples[number * self.request.chunk : (number + 1) * self.request.chunk]


def to_record(view: View, ids: Tensor) -> tuple[Any, ...]:
    """Return a view and its ids (h, w) as the fields of a record."""
    colours, factors = [0] * len(COLOURS), [0.0] * len(COLOURS)
    for place, (name, factor) in enumerate(view.jitter):
        colours[place], factors[place] = COLOURS.index(name) + 1, factor
    box = (view.top, view.left, view.height, view.width)
    return box, view.flip, tuple(colours), tuple(factors), ids.numpy(force=True)


def _view_of(record: Any) -> View:
    jitter = tuple(
        (COLOURS[colour - 1], factor)
        for colour, factor in zip(record["colours"].tolist(), record["factors"].tolist(), strict=True)
        if colour
    )
    top, left, height, width = record["box"].tolist()
    return View(top, left, height, width, bool(record["flip"]), jitter)


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(read_text(folder / MANIFEST))
    except ValidationError as error:
        raise InvalidValueError(
            f"{folder / MANIFEST} is damaged, or of another version of beitzoo; {_AGAIN} in another folder."
        ) from error


def _checksum(path: Path) -> str | None:
    """Return the sha256 of a file; None if it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _first_difference(there: BaseModel, here: BaseModel) -> str:
    """Name the first value that differs; empty if all are the same."""
    for name in type(there).model_fields:
        theirs, ours = getattr(there, name), getattr(here, name)
        if theirs != ours:
            nested = isinstance(theirs, BaseModel)
            return _first_difference(theirs, ours) if nested else f"{name} is {theirs!r} there and {ours!r} here"
    return ""
