"""What a masked image model makes of masked patches, as pictures: its predictions beside what the tokenizer keeps.

BEiT (https://arxiv.org/abs/2106.08254), figure 1: visual tokens are decoded to pixels where the tokenizer can. Where
it decodes to a teacher's features (BEiT v2), the tokens themselves are shown as a map of codes in colour.

Shapes: B batch, h w patch grid, V visual tokens, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.factory import Tokenizer, check_tokenizer
from beitzoo.files import write_atomically
from beitzoo.images import pictures
from beitzoo.images.files import ImageError, as_image
from beitzoo.images.masks import Masking, draw_mask, sample_generator
from beitzoo.images.pictures import Array, Coded
from beitzoo.images.transforms import create_transform, prepare, resolve_data_config
from beitzoo.inference.classify import NOT_FINITE, eval_mode
from beitzoo.inference.pipeline import Failure
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.random_tokenizer import RandomTokenizer
from beitzoo.models.tokenizers import Dvae, Vqkd
from beitzoo.zoo.networks import Pair

_BATCH = 16  # images per forward pass
_LEAST = 1e-3  # nats at the end of the scale, where a model is right beyond rounding
_HEAT = "loss of masked patches, nats"
_TITLES = {
    "pixels": ("image", "masked image", "decoded: predicted tokens", "decoded: the image's tokens", _HEAT),
    "features": ("image", "masked image", "codes: predicted", "codes: the image's own", _HEAT),
}


@dataclass(frozen=True)
class Reconstruction:
    """What the model and the tokenizer made of one image.

    Attributes:
        name: What the image is called.
        image: As the network sees it.
        mask: (h, w), True where a patch is masked.
        ids: Visual tokens of the whole image by the tokenizer, (h, w).
        predicted: The model's likeliest tokens where masked, the tokenizer's elsewhere, (h, w).
        losses: Cross-entropy of each masked patch, nats, (h, w); NaN elsewhere. With patch aggregation it is that of
            the last block alone.
        decoded: Both kinds of tokens made visible, the predicted and the image's own: decoded pixels, or one colour
            for each code.
        colours: Of all codes, (V, 3), where tokens are not decoded to pixels.
        nearness: Cosine of the angle between each patch, before it is rounded, and its code, (h, w); there too.
        vocab_size: Codes that the model chooses from.
    """

    name: str
    image: Image.Image
    mask: Array
    ids: Array
    predicted: Array
    losses: Array
    decoded: tuple[Image.Image, Image.Image]
    colours: Array | None
    nearness: Array | None
    vocab_size: int

    @property
    def loss(self) -> float:
        """Mean loss of the masked patches, nats."""
        return float(np.nanmean(self.losses))

    def describe(self) -> str:
        """Say in a line how much was masked and how well it was predicted."""
        count, right = int(self.mask.sum()), int((self.predicted == self.ids)[self.mask].sum())
        return (
            f"{self.name}: {count} of {self.mask.size} patches masked, mean loss {self.loss:.2f} nats, "
            f"right tokens: {right} ({100 * right / count:.0f} %)"
        )


def default_masking(grid: Pair) -> Masking:
    """Return BEiT's masking for any grid: 75 of 196 patches, and no fewer, in blocks of 16 or more; in proportion."""
    patches = grid[0] * grid[1]
    return Masking(
        grid=grid,
        count=max(1, round(patches * 75 / 196)),
        exact=True,
        min_block=max(1, round(patches * 16 / 196)),
    )


def reconstruct(
    model: MaskedImageModel,
    tokenizer: Tokenizer,
    images: Sequence[Any],
    masking: Masking | None = None,
    *,
    seed: int = 0,
) -> list[Reconstruction | Failure]:
    """Mask images, predict the visual tokens of masked patches, and compare them with the tokenizer's.

    Nothing is drawn from global generators, and both networks are afterwards in the mode they were in.

    Args:
        model: The masked image model.
        tokenizer: The tokenizer whose codes it predicts, on the model's device.
        images: Whatever `as_image` takes: paths, PIL images, bytes as arrays.
        masking: How patches are masked; `default_masking` if None.
        seed: Of the masks; that of an image depends on its place too.

    Returns:
        An outcome for each image, in order; a failure is one that cannot be read, or whose loss is not finite.

    Raises:
        InvalidValueError: The grids, or the codes, of the model, the tokenizer and the masking do not agree.
    """
    masking = default_masking(model.backbone.config.grid_size) if masking is None else masking
    _check_pair(model, tokenizer, masking)
    compare = _Comparison(model, tokenizer)
    outcomes: list[Reconstruction | Failure] = []
    with eval_mode([model, tokenizer]), torch.no_grad():
        for start in range(0, len(images), _BATCH):
            sources = enumerate(images[start : start + _BATCH], start)
            looks = [compare.look(source, place, masking, seed) for place, source in sources]
            compared = iter(compare([look for look in looks if not isinstance(look, Failure)]))
            outcomes += [look if isinstance(look, Failure) else next(compared) for look in looks]
    return outcomes


def picture(records: Sequence[Reconstruction], caption: str = "") -> Image.Image:
    """Draw a row of panels for each image; the last is a heat map, whose one scale for all images stands below.

    Where tokens are not decoded to pixels, patches of the images that have the same code stand below that.

    Args:
        records: At least one; all by the same model and tokenizer.
        caption: What is to be said of all, such as the name of the model.
    """
    check(bool(records), "There is nothing to draw; give at least one image that can be read.")
    first = records[0]
    size = pictures.panel_size(first.image)
    most = max(_LEAST, *(float(np.nanmax(record.losses)) for record in records))
    titles = _TITLES["pixels" if first.colours is None else "features"]
    parts = [pictures.beside([pictures.text(title, size[0], 16) for title in titles])]
    width = parts[0].width
    for record in records:
        panels = pictures.beside(_panels(record, size, most))
        parts.append(pictures.stack([pictures.text(record.describe(), width, 14, pictures.FAINT), panels], gap=4))
    left = pictures.text(caption, width - size[0] - 8, 14, pictures.FAINT)
    parts.append(pictures.beside([left, _scale(most, size[0], first.vocab_size)]))
    if first.colours is not None:
        parts += _same_codes(records, size, first.colours, width)
    return pictures.framed(pictures.stack(parts, gap=14))


def write_reconstructions(
    model: MaskedImageModel,
    tokenizer: Tokenizer,
    images: Sequence[Any],
    path: Path,
    seed: int = 0,
    masking: Masking | None = None,
) -> None:
    """Draw what the model makes of a few images into a PNG file, which is written atomically.

    It is a forward pass of each network, on the devices where they are. Neither their mode nor a global generator
    is changed. Nothing is written if no image can be read.

    Args:
        model: As in `reconstruct`.
        tokenizer: As in `reconstruct`.
        images: As in `reconstruct`; four to eight are enough to see how training goes.
        path: The file.
        seed: Of the masks.
        masking: As in `reconstruct`; that of the training shows what is trained.
    """
    outcomes = reconstruct(model, tokenizer, images, masking, seed=seed)
    records = [outcome for outcome in outcomes if isinstance(outcome, Reconstruction)]
    if records:
        write_picture(picture(records), path)


def write_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


# ---- networks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """One image before the networks: the network's view (C, H, W), normalised, the tokenizer's, and the mask (h, w)."""

    name: str
    patch_view: Tensor
    token_view: Tensor
    mask: Tensor


class _Comparison:
    """The model and the tokenizer with the transforms of their views, which show the same part of an image."""

    def __init__(self, model: MaskedImageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = model.lm_head.weight.device
        self.coder = _coder(tokenizer)
        codebook = None if self.coder is None else self.coder.codebook.double().numpy(force=True)
        self.colours = None if codebook is None else pictures.code_colours(codebook)
        data = resolve_data_config(model)
        channels = tokenizer.in_chans
        self.mean, self.std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
        self.patch_transform = create_transform(**data)
        self.token_transform = create_transform(
            **{
                **data,
                "input_size": (channels, *tokenizer.img_size),
                "interpolation": tokenizer.interpolation,
                "mean": (0.0,) * channels,
                "std": (1.0,) * channels,
            }
        )

    def look(self, source: Any, place: int, masking: Masking, seed: int) -> _Look | Failure:
        """Open an image for both networks and draw its mask."""
        name = Path(source).name if isinstance(source, str | Path) else f"image {place + 1}"
        wanted = self.model.backbone.in_chans, self.tokenizer.in_chans
        try:
            images = {channels: as_image(source, channels) for channels in set(wanted)}
            patch_view = prepare(images[wanted[0]], self.patch_transform)
            token_view = prepare(images[wanted[1]], self.token_transform)
        except ImageError as error:
            return Failure(str(error))
        return _Look(name, patch_view, token_view, draw_mask(masking, sample_generator(seed, 0, place, "mask")))

    def __call__(self, looks: Sequence[_Look]) -> list[Reconstruction | Failure]:
        """Run both networks on a batch; where a loss is not finite, that is the outcome."""
        if not looks:
            return []
        patch_views = torch.stack([look.patch_view for look in looks]).to(self.device, self.model.lm_head.weight.dtype)
        masks = torch.stack([look.mask for look in looks])
        token_views = torch.stack([look.token_view for look in looks]).to(self.device)
        ids = self.tokenizer.encode(token_views).cpu()
        logits = self.model(patch_views, masks.to(self.device))
        of_masked = (logits if isinstance(logits, Tensor) else logits[0]).float().cpu()  # the last block's
        predicted, losses = ids.clone(), torch.full(ids.shape, math.nan)
        predicted[masks] = of_masked.argmax(dim=-1)
        losses[masks] = F.cross_entropy(of_masked, ids[masks], reduction="none")
        decoded = [self._decode(one) for one in (predicted, ids)]
        nearness = self._nearness(token_views, ids)
        outcomes: list[Reconstruction | Failure] = []
        for place, look in enumerate(looks):
            record = Reconstruction(
                name=look.name,
                image=_image(look.patch_view * self.std + self.mean),
                mask=look.mask.numpy(),
                ids=ids[place].numpy(),
                predicted=predicted[place].numpy(),
                losses=losses[place].numpy(),
                decoded=(decoded[0][place], decoded[1][place]),
                colours=self.colours,
                nearness=None if nearness is None else nearness[place],
                vocab_size=self.tokenizer.vocab_size,
            )
            outcomes.append(record if np.isfinite(record.losses[record.mask]).all() else Failure(NOT_FINITE))
        return outcomes

    def _decode(self, ids: Tensor) -> list[Image.Image]:
        """Make codes (B, h, w) visible: as pixels, or in their colours."""
        if self.colours is None:
            return [_image(one) for one in self.tokenizer.decode(ids.to(self.device)).float().cpu()]
        return [Image.fromarray(self.colours[one.numpy()]) for one in ids]

    def _nearness(self, token_views: Tensor, ids: Tensor) -> Array | None:
        """Return the cosine between what each patch was before it was rounded, and its code, (B, h, w)."""
        if self.coder is None:
            return None
        features = self.coder.features(token_views).float().unflatten(1, ids.shape[1:])
        codes = F.embedding(ids.to(self.device), self.coder.codebook.float())
        nearness: Array = F.cosine_similarity(features, codes, dim=-1).numpy(force=True)
        return nearness


def _coder(tokenizer: Tokenizer) -> Vqkd | RandomTokenizer | None:
    """Return the tokenizer if its codes have no pixels, only vectors."""
    return None if isinstance(tokenizer, Dvae) or tokenizer.decodes_to == "pixels" else tokenizer


def _check_pair(model: MaskedImageModel, tokenizer: Tokenizer, masking: Masking) -> None:
    check_tokenizer(model, tokenizer)
    grid = model.backbone.config.grid_size
    check(
        masking.grid == grid,
        f"The mask is one of {masking.grid[0]} x {masking.grid[1]} patches, and the model has {grid[0]} x {grid[1]}; "
        "give Masking(grid=model.backbone.config.grid_size).",
    )
    for name, channels in (("model", model.backbone.in_chans), ("tokenizer", tokenizer.in_chans)):
        check(channels in (1, 3), f"The {name} takes {channels} channels; image files have 1 (grey) or 3 (RGB).")


# ---- drawing -------------------------------------------------------------------------------------------------


def _panels(record: Reconstruction, size: Pair, most: float) -> list[Image.Image]:
    image = pictures.fit(record.image, size)
    return [
        image,
        pictures.masked(image, record.mask),
        *(pictures.fit(decoded, size) for decoded in record.decoded),
        pictures.heat_map(image, record.losses, most),
    ]


def _scale(most: float, width: int, vocab_size: int) -> Image.Image:
    """Draw the scale of the heat maps, and say what a guess would cost."""
    guess = pictures.text(f"a uniform guess: {math.log(vocab_size):.2f} nats", width, 13, pictures.FAINT)
    return pictures.stack([pictures.heat_scale(most, width), guess], gap=2)


def _same_codes(records: Sequence[Reconstruction], size: Pair, colours: Array, width: int) -> list[Image.Image]:
    """Show patches that have the same code: what the codes stand for."""
    coded = [
        Coded(pictures.fit(record.image, size), record.ids, record.nearness)
        for record in records
        if record.nearness is not None
    ]
    strips = pictures.code_patches(coded, colours, width)
    title = "the commonest codes of these images, and the patches nearest to each"
    return [pictures.text(title, width, 16), *strips] if strips else []


def _image(pixels: Tensor) -> Image.Image:
    """Turn pixels (1 or 3, height, width) in [0, 1] into an image."""
    levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
