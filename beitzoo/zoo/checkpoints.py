"""The record of a checkpoint: where its bytes are, what its head tells apart, and how images are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from beitzoo.errors import check
from beitzoo.zoo.networks import BeitConfig, MimConfig, SegmenterConfig, is_number

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Activation = Literal["softmax", "sigmoid"]
CropMode = Literal["center", "center_floor", "squash", "border"]
# The name of a set of class names (see `zoo.labels`), or the names themselves, in the order of the outputs.
Labels = str | tuple[str, ...]

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a checkpoint expects of an image; the fields and their meaning are timm's.

    Attributes:
        input_size: Channels, height, width.
        mean: Per channel, subtracted after scaling to [0, 1].
        std: Per channel, divided by afterwards.
        interpolation: Filter of the resize.
        crop_pct: Share of the resized image that the crop keeps, per side.
        crop_mode: Crop the centre, squash to the crop, or pad to it. Of an odd number of pixels to cut, `center` rounds
            the half to even, as timm, and `center_floor` down, as transformers; timm takes that word for `center`.
        reduce_zero_label: Maps of classes count from 1, and 0 is a pixel without one, as in ADE20K.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.9
    crop_mode: CropMode = "center"
    reduce_zero_label: bool = False

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        check(
            len(self.mean) == len(self.std) == channels,
            f"{channels} channels with {len(self.mean)} means and {len(self.std)} deviations; give one each.",
        )
        check(all(map(is_number, self.mean)), f"mean={self.mean}; it must be numbers.")
        check(all(is_number(s) and s > 0 for s in self.std), f"std={self.std}; it must be positive numbers.")
        for name, kind in (("interpolation", Interpolation), ("crop_mode", CropMode)):
            value = getattr(self, name)
            check(value in get_args(kind), f"{name}={value!r}; there are {', '.join(get_args(kind))}.")
        check(0 < self.crop_pct <= 1, f"crop_pct={self.crop_pct}; it must be in (0, 1].")
        reduces = self.reduce_zero_label
        check(isinstance(reduces, bool), f"reduce_zero_label={reduces!r}; it must be True or False.")

    def fitted_to(self, config: BeitConfig) -> "DataConfig":
        """Return this config with the network's size and channels.

        Statistics of another channel count are averaged: there is no telling which channel is which.
        """
        size = (config.in_chans, *config.img_size)
        if config.in_chans == self.input_size[0]:
            return replace(self, input_size=size)
        mean = (sum(self.mean) / len(self.mean),) * config.in_chans
        std = (sum(self.std) / len(self.std),) * config.in_chans
        return replace(self, input_size=size, mean=mean, std=std)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub; `revision` None follows the main branch."""

    repo_id: str
    filename: str = "model.safetensors"
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ReleaseFile:
    """A file of the authors' releases (addf400/files on GitHub).

    `sha256_prefix` are the first digits of its sha256, where its name states them and nobody states the rest.
    """

    release: str
    filename: str
    sha256: str | None = None
    sha256_prefix: str | None = None

    @property
    def url(self) -> str:
        """Where the file is."""
        return f"https://github.com/addf400/files/releases/download/{self.release}/{self.filename}"

    @property
    def folder(self) -> str:
        """Where its copy is kept, in our own folder of a cache."""
        return self.release


@dataclass(frozen=True)
class WebFile:
    """A file at an address of its own."""

    url: str
    sha256: str | None = None
    sha256_prefix: str | None = None

    @property
    def folder(self) -> str:
        """Where its copy is kept, in our own folder of a cache."""
        return self.url.split("/")[-2]

    @property
    def filename(self) -> str:
        """What its copy is called."""
        return self.url.split("/")[-1]


@dataclass(frozen=True)
class PackageFile:
    """A file that is installed with beitzoo, relative to the package."""

    path: str
    sha256: str


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path


Source = HubFile | ReleaseFile | WebFile | PackageFile | LocalFile


@dataclass(frozen=True, kw_only=True)
class Classify:
    """A head that tells classes of images apart.

    Attributes:
        num_classes: Outputs of the head; 0 for a backbone without one.
        labels: Names of the classes; None where nobody named them.
        activation: What turns logits into probabilities: one class per image, or any number of them.
    """

    num_classes: int = 1000
    labels: Labels | None = None
    activation: Activation = "softmax"


@dataclass(frozen=True, kw_only=True)
class Mim:
    """A head that predicts the visual tokens of masked patches.

    Attributes:
        network: The head, and with BEiT v2 the blocks of patch aggregation.
        tokenizer: Name of the tokenizer whose codes it predicts; None if that is not known.
    """

    network: MimConfig = field(default_factory=MimConfig)
    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A head that tells the classes of pixels apart.

    Attributes:
        network: Decoder and auxiliary head; None where a file has the backbone of a segmentation model only.
        labels: Names of the classes; None where nobody named them.
    """

    network: SegmenterConfig | None = field(default_factory=SegmenterConfig)
    labels: Labels | None = None

    @property
    def num_classes(self) -> int:
        """Classes of a pixel; 0 without a decoder."""
        return 0 if self.network is None else self.network.num_classes


Head = Classify | Mim | Segment


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """One checkpoint: where its bytes are and all that must be known to use them.

    Attributes:
        sources: Places that have the weights, tried in this order. All hold the same tensors.
        head: What the file was trained for: classes, visual tokens of masked patches, or classes of pixels.
        data: The images it was trained on.
        license: Of the weights, as their authors state it.
        paper: Where the training is described.
        overrides: Fields of `BeitConfig` in which the file differs from its architecture.
        architecture: Name of the network, as in timm's `pretrained_cfg`; None in the table, whose keys say it.
        tag: How it was trained, the part of a name behind the dot; None likewise.
    """

    sources: tuple[Source, ...] = ()
    head: Head = field(default_factory=Classify)
    data: DataConfig = field(default_factory=DataConfig)
    license: str | None = None
    paper: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    tag: str | None = None

    def without_weights(self, head: "Head") -> "PretrainedConfig":
        """Return what still holds where the weights are random: how images are prepared, and the head.

        Labels, licence and paper are those of weights, so they go; the head is new.
        """
        return PretrainedConfig(head=head, data=self.data, architecture=self.architecture)

    def to_timm(self, config: BeitConfig) -> dict[str, Any]:
        """Return timm's `pretrained_cfg` dict for a network of this config, at its current size."""
        data = self.data.fitted_to(config)
        names = {name: getattr(data, name) for name in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
        hub = [source.repo_id for source in self.sources if isinstance(source, HubFile)]
        named = {"architecture": self.architecture, "tag": self.tag, "hf_hub_id": hub[0] if hub else None}
        return {
            **{name: value for name, value in named.items() if value is not None},
            "input_size": data.input_size,
            "fixed_input_size": not (config.dynamic_img_size or config.dynamic_img_pad),
            **names,
            "num_classes": self.head.num_classes if isinstance(self.head, Classify) else 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": self.license,
        }
