"""Images in, labels out: one answer or one named failure for each, in order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beitzoo.images.datasets import ImageError, open_image
from beitzoo.images.transforms import Transform, create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.zoo.labels import label_names


@dataclass(frozen=True)
class Answer:
    """One class of one image.

    Attributes:
        index: Output of the head.
        label: Its name, or its number as text where the checkpoint has no names.
        probability: Softmax of the logits, 0 to 1.
    """

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What became of one image: its likeliest classes, or the reason why there are none."""

    path: Path
    answers: tuple[Answer, ...] = ()
    error: str | None = None


def predict(model: Beit, paths: Sequence[Path], *, topk: int = 3, batch_size: int = 16) -> Iterator[Prediction]:
    """Classify image files; as many predictions come out as paths went in, in the same order.

    Args:
        model: A classifier; it is put in eval mode.
        paths: Files; only one batch of them is in memory at a time.
        topk: Classes per image, likeliest first; no more than there are.
        batch_size: Images per forward pass.

    Raises:
        ValueError: The model has no head.
    """
    if not model.num_classes:
        raise ValueError("This model has no head to predict with; create it with num_classes > 0.")
    if model.config.in_chans not in (1, 3):
        raise ValueError(f"This model takes {model.config.in_chans} channels; image files have 1 (grey) or 3 (RGB).")
    model.eval()
    transform = create_transform(**resolve_data_config(model))
    names = label_names(model.pretrained) if model.num_classes == model.pretrained.num_classes else None
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        opened = [_open(path, transform, model.config.in_chans) for path in chunk]
        answers = iter(_classify(model, [image for image in opened if isinstance(image, Tensor)], topk, names))
        for path, image in zip(chunk, opened, strict=True):
            yield Prediction(path, next(answers)) if isinstance(image, Tensor) else Prediction(path, error=str(image))


def _open(path: Path, transform: Transform, in_chans: int) -> Tensor | ImageError:
    try:
        return transform(open_image(path, in_chans))
    except ImageError as error:
        return error


@torch.inference_mode()
def _classify(model: Beit, images: list[Tensor], topk: int, names: tuple[str, ...] | None) -> list[tuple[Answer, ...]]:
    if not images:
        return []
    like = model.cls_token
    batch = torch.stack(images).to(device=like.device, dtype=like.dtype)
    top = model(batch).float().softmax(dim=-1).topk(min(topk, model.num_classes))
    return [
        tuple(Answer(i, names[i] if names else str(i), p) for p, i in zip(values, indices, strict=True))
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
