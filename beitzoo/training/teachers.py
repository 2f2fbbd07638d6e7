"""Teachers of VQ-KD: frozen networks that give features of patches, from timm, transformers or a folder.

BEiT v2 (https://arxiv.org/abs/2208.06366), section 2.2, has two: the patch tokens of CLIP ViT-B/16 behind its last norm
and its projection (512 channels), and those of DINO ViT-B/16 behind its last norm (768); `modeling_vqkd.py`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import UnsupportedError, UserError, closest
from beitzoo.factory import create_model
from beitzoo.files import full_path
from beitzoo.images.transforms import resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.weights import folder
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.zoo.networks import Pair

TIMM, TRANSFORMERS, FOLDER = "timm:", "transformers:", "local-dir:"

_MOST_PREFIX_TOKENS = 16  # before the patches: class token, distillation token, registers
_EXAMPLES = "timm:vit_base_patch16_224.dino or transformers:openai/clip-vit-base-patch16"


class TeacherError(UserError, ValueError):
    """A teacher that cannot be had, or gives no features of patches."""


class Teacher(nn.Module):
    """A frozen network with features of patches.

    Attributes:
        network: Makes tokens of images.
        projection: Maps a token to its feature.
        img_size: Height and width of the images that the network sees, pixels.
        patches: How many features an image has.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: "_Source", grid: Pair, projection: nn.Module) -> None:
        super().__init__()
        self.network = source.network
        self.projection = projection
        self.img_size = source.img_size(grid)
        self.patches = grid[0] * grid[1]
        self._tokens = source.tokens
        self.register_buffer("mean", torch.tensor(source.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(source.std).view(-1, 1, 1))
        self.requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        """Channels of a feature."""
        device = self.mean.device
        return int(self(torch.zeros(1, len(self.mean), *self.img_size, device=device)).shape[-1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) of any size, with values in [0, 1], to features (B, h w, dim)."""
        if tuple(images.shape[-2:]) != self.img_size:
            images = F.interpolate(images, self.img_size, mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self._tokens((images - self.mean) / self.std)
        features: Tensor = self.projection(tokens[:, -self.patches :])
        return features


@dataclass(frozen=True)
class _Source:
    """What the library of a network says of it.

    Attributes:
        name: As the user gave it.
        network: The network.
        tokens: Maps normalised images to all its tokens behind the last norm, (B, N, C).
        resize: Fits the network to another size of images; None if it takes one size only.
        patch_size: Height and width of a patch, pixels.
        native_size: Height and width of the images that it takes as it is.
        mean: Of its images, per channel.
        std: Of its images, per channel.
        projection: Into the space that images share with texts, if there is one.
    """

    name: str
    network: nn.Module
    tokens: Callable[[Tensor], Tensor]
    resize: Callable[[Pair], object] | None
    patch_size: Pair
    native_size: Pair
    mean: tuple[float, ...]
    std: tuple[float, ...]
    projection: nn.Module | None = None

    def img_size(self, grid: Pair) -> Pair:
        """Return the size of images that have this grid of patches."""
        return grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]


def load_teacher(name: str, grid: Pair, in_chans: int, projection: bool = False) -> Teacher:
    """Load a teacher whose patches are those of a tokenizer.

    Args:
        name: `timm:NAME` or `transformers:NAME`, as these libraries call a model that they download; or
            `local-dir:PATH`, a folder of a model of beitzoo, timm or transformers, or of a run.
        grid: Rows and columns of patches; the teacher sees the same images at the size that has them.
        in_chans: Channels of these images.
        projection: Map features into the space that images share with texts.

    Raises:
        TeacherError: There is no such model, it has no features of patches, or none on this grid.
    """
    source = _find(name)
    size = source.img_size(grid)
    if size != source.native_size:
        if source.resize is None:
            rows, columns = (s // p for s, p in zip(source.native_size, source.patch_size, strict=True))
            raise TeacherError(
                f"{name} takes images of {source.native_size} only, which are {rows} x {columns} patches, and the "
                f"tokenizer has {grid[0]} x {grid[1]}. Choose another teacher, or another img_size of the tokenizer."
            )
        source.resize(size)
    if len(source.mean) != in_chans:
        raise TeacherError(
            f"{name} takes images of {len(source.mean)} channels, and the tokenizer has {in_chans}. Choose another "
            "teacher, or another in_chans of the tokenizer."
        )
    if projection and source.projection is None:
        raise TeacherError(f"{name} has no projection into a space shared with texts; leave out task.projection.")
    head = source.projection if projection and source.projection is not None else nn.Identity()
    teacher = Teacher(source, grid, head)
    _check_tokens(name, _try(source, torch.zeros(1, in_chans, *size)), grid)
    return teacher


def _try(source: _Source, images: Tensor) -> object:
    try:
        with torch.no_grad():
            return source.tokens(images)
    except Exception as error:  # a network of another kind stumbles over whatever it is not made for
        raise TeacherError(
            f"{source.name} cannot make features of images of shape {tuple(images.shape)}: {error}. Choose a network "
            f"of patches, such as {_EXAMPLES}."
        ) from error


def _check_tokens(name: str, tokens: object, grid: Pair) -> None:
    """Refuse an output that is not a vector for each patch of the grid."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        found = f"an output of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TeacherError(_no_patches(name, found))
    extra = tokens.shape[1] - grid[0] * grid[1]
    if not 0 <= extra <= _MOST_PREFIX_TOKENS:
        raise TeacherError(_no_patches(name, f"{tokens.shape[1]} tokens for an image of {grid[0]} x {grid[1]} patches"))


def _no_patches(name: str, found: str) -> str:
    return (
        f"{name} gives {found}, and VQ-KD needs a feature for each patch. Choose a network whose last layer has tokens "
        f"of patches, such as {_EXAMPLES}; or task.teacher='pixels', which needs none."
    )


def _find(name: str) -> _Source:
    readers = {TIMM: _of_timm, TRANSFORMERS: _of_transformers, FOLDER: _of_folder}
    for prefix, read in readers.items():
        if name.startswith(prefix):
            return read(name, name.removeprefix(prefix))
    raise TeacherError(
        f"task.teacher={name!r} is no teacher; give 'pixels', {TIMM}NAME, {TRANSFORMERS}NAME or {FOLDER}PATH."
    )


def _of_folder(name: str, path: str) -> _Source:
    """Find out whose folder it is; what is a BEiT is read by beitzoo, whoever wrote it."""
    directory = folder.model_folder(full_path(path))
    config = directory / folder.CONFIG
    if not config.is_file():
        raise TeacherError(f"There is no {config}; {FOLDER}PATH is the folder of a model or of a run.")
    try:
        folder.read(directory)
    except CheckpointError:
        if folder.needs_preprocessor(folder.read_json(config)):
            return _of_transformers(name, str(directory))
        return _of_timm(name, f"{FOLDER}{directory}")
    return _of_beitzoo(name, directory)


def _of_beitzoo(name: str, directory: Path) -> _Source:
    network = create_model(directory, pretrained=True)
    beit = network.backbone
    assert isinstance(beit, Beit)
    data = resolve_data_config(beit)

    def tokens(images: Tensor) -> Tensor:
        found = beit.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)
        last: Tensor = found[0]
        return last

    config = beit.config
    return _Source(
        name=name,
        network=beit,
        tokens=tokens,
        resize=beit.set_input_size,
        patch_size=config.patch_size,
        native_size=config.img_size,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _of_timm(name: str, timm_name: str) -> _Source:
    import timm

    if not timm_name.startswith(FOLDER) and not timm.is_model(timm_name.partition(".")[0]):
        raise TeacherError(f"timm has no model {timm_name!r}; {closest(timm_name, timm.list_models(pretrained=True))}")
    network: Any = _loaded(name, lambda: timm.create_model(timm_name, pretrained=True))
    patch_size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch_size is None:
        raise TeacherError(_no_patches(name, f"a {type(network).__name__} without patches"))

    def tokens(images: Tensor) -> Tensor:
        # A network that pools the mean of its tokens has their last norm behind the pooling.
        found: Tensor = network.forward_features(images)
        return getattr(network, "fc_norm", nn.Identity())(found) if found.ndim == 3 else found

    head = getattr(network, "head", None)
    return _Source(
        name=name,
        network=network,
        tokens=tokens,
        resize=getattr(network, "set_input_size", None),
        patch_size=_pair(patch_size),
        native_size=_pair(network.pretrained_cfg["input_size"][1:]),
        mean=tuple(network.pretrained_cfg["mean"]),
        std=tuple(network.pretrained_cfg["std"]),
        projection=head if isinstance(head, nn.Linear) else None,
    )


def _of_transformers(name: str, repository: str) -> _Source:
    try:
        from transformers import AutoModel
        from transformers.image_processing_utils import BaseImageProcessor
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{name} needs transformers; install it with: pip install transformers") from error
    whole: Any = _loaded(name, lambda: AutoModel.from_pretrained(repository))
    network: Any = getattr(whole, "vision_model", whole)
    patch_size, native_size = (getattr(network.config, field, None) for field in ("patch_size", "image_size"))
    if patch_size is None or native_size is None:
        raise TeacherError(_no_patches(name, f"a {type(network).__name__} without patches"))
    images: Any = _loaded(name, lambda: BaseImageProcessor.get_image_processor_dict(repository)[0])
    options: dict[str, bool] = {}

    def resize(size: Pair) -> None:
        options["interpolate_pos_encoding"] = True

    resizes = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
    return _Source(
        name=name,
        network=network,
        tokens=_NormedTokens(network, options),
        resize=resize if resizes else None,
        patch_size=_pair(patch_size),
        native_size=_pair(native_size),
        mean=tuple(images["image_mean"]),
        std=tuple(images["image_std"]),
        projection=getattr(whole, "visual_projection", None),
    )


@dataclass(frozen=True)
class _NormedTokens:
    """The tokens of a network of transformers behind its last norm, (B, N, C).

    CLIP applies that norm (`post_layernorm`) to the class token alone, and BEiT (`pooler.layernorm`) to the mean.
    """

    network: Any
    options: dict[str, bool]

    def __call__(self, images: Tensor) -> Tensor:
        seen: list[int] = []
        norm = getattr(self.network, "post_layernorm", None) or getattr(
            getattr(self.network, "pooler", None), "layernorm", None
        )
        watch = None if norm is None else norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].ndim))
        try:
            tokens: Tensor = self.network(pixel_values=images, **self.options).last_hidden_state
        finally:
            if watch is not None:
                watch.remove()
        return norm(tokens) if norm is not None and seen == [2] else tokens


def _loaded(name: str, load: Callable[[], object]) -> object:
    """Load with a library, whose errors are many; what it says is passed on."""
    try:
        return load()
    except Exception as error:
        raise TeacherError(f"The teacher {name} cannot be loaded: {error}") from error


def _pair(sides: int | Sequence[int]) -> Pair:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
