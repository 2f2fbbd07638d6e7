"""How right the checkpoints are, as published: one literal table for each source.

These are facts about checkpoints, so they are installed with the package; `results/accuracy/*.csv` is written from
them (`beitzoo report`) in timm's columns. What was left open by a source is None here and empty there.

The evaluators differ: timm crops as the checkpoint's own transform says, BEiT's authors keep 0.875 of the image below
384 pixels and all of it from there on (`run_class_finetuning.py`).
"""

from dataclasses import dataclass

from beitzoo.zoo.checkpoints import Interpolation
from beitzoo.zoo.pretrained import PRETRAINED


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One checkpoint on one set of images.

    Attributes:
        model: `architecture.tag`.
        data: The set of images: a key of `DATA_SETS`.
        source: Who measured it, and where that is written.
        img_size: Width of the images, pixels.
        top1: Per cent of images whose likeliest class is the right one; None for a segmentation.
        top5: Per cent whose right class is among the five likeliest.
        crop_pct: Share of the resized image that was kept, per side.
        interpolation: Filter of the resize.
        rank_diff: Places won among all of timm's models against the set that `DATA_SETS` names for comparison.
        miou: Per cent, mean intersection over union of the classes.
        macc: Per cent, mean accuracy of the classes.
        aacc: Per cent of all pixels.
        protocol: How a segmentation was evaluated.
    """

    model: str
    data: str
    source: str
    img_size: int
    top1: float | None = None
    top5: float | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    rank_diff: int | None = None
    miou: float | None = None
    macc: float | None = None
    aacc: float | None = None
    protocol: str | None = None


# What each set is compared with in timm's tables, by its own name there; None is a set that others are compared with.
DATA_SETS: dict[str, str | None] = {
    "imagenet": None,
    "imagenet-real": "imagenet",
    "imagenetv2-matched-frequency": "imagenet",
    "sketch": "imagenet",
    "imagenet-a": "imagenet-a-clean",
    "imagenet-r": "imagenet-r-clean",
    "imagenet-a-clean": None,
    "imagenet-r-clean": None,
    "ade20k": None,
    "digits": None,
}

Pairs = tuple[tuple[float, float], ...]

# top1 and top5 on ImageNet, ReaL, V2, Sketch, A, R, and the 200 classes of A and of R among ImageNet's validation
# images; timm, results/results-*.csv of October 2025.
_TIMM: dict[str, Pairs] = {
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (
        (85.238, 97.654),
        (89.427, 98.520),
        (75.690, 93.430),
        (46.260, 69.909),
        (50.747, 79.893),
        (60.163, 75.380),
        (97.070, 99.610),
        (96.660, 99.660),
    ),
    "beit_base_patch16_384.in22k_ft_in22k_in1k": (
        (86.814, 98.136),
        (90.407, 98.738),
        (77.790, 94.320),
        (48.696, 72.094),
        (67.013, 89.093),
        (63.410, 77.843),
        (97.830, 99.700),
        (97.350, 99.710),
    ),
    "beit_large_patch16_224.in22k_ft_in22k_in1k": (
        (87.486, 98.318),
        (90.159, 98.725),
        (79.360, 94.930),
        (54.973, 77.616),
        (69.053, 89.973),
        (71.027, 83.347),
        (98.170, 99.760),
        (97.500, 99.680),
    ),
    "beit_large_patch16_384.in22k_ft_in22k_in1k": (
        (88.380, 98.604),
        (90.599, 98.772),
        (80.270, 95.600),
        (56.979, 79.166),
        (80.173, 94.733),
        (73.187, 84.807),
        (98.500, 99.820),
        (97.810, 99.790),
    ),
    "beit_large_patch16_512.in22k_ft_in22k_in1k": (
        (88.576, 98.656),
        (90.715, 98.770),
        (80.820, 95.860),
        (56.796, 78.897),
        (82.960, 95.720),
        (73.047, 84.937),
        (98.560, 99.830),
        (97.770, 99.810),
    ),
    "beitv2_base_patch16_224.in1k_ft_in1k": (
        (85.596, 97.514),
        (89.271, 98.249),
        (76.470, 92.900),
        (45.998, 67.871),
        (53.640, 81.827),
        (61.487, 76.000),
        (97.170, 99.460),
        (96.780, 99.550),
    ),
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": (
        (86.494, 98.056),
        (89.758, 98.593),
        (77.270, 94.030),
        (49.523, 72.397),
        (61.480, 85.573),
        (65.747, 78.837),
        (97.700, 99.680),
        (96.960, 99.720),
    ),
    "beitv2_large_patch16_224.in1k_ft_in1k": (
        (87.414, 98.216),
        (90.112, 98.437),
        (78.600, 94.190),
        (54.165, 75.564),
        (67.627, 88.733),
        (70.440, 83.413),
        (97.920, 99.660),
        (97.290, 99.740),
    ),
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k": (
        (88.406, 98.602),
        (90.362, 98.582),
        (80.410, 95.210),
        (58.378, 80.224),
        (76.600, 93.293),
        (76.310, 87.050),
        (98.550, 99.760),
        (97.760, 99.790),
    ),
}

# The rank differences of the same files: ReaL, V2, Sketch, A, R.
_TIMM_RANKS: dict[str, tuple[int, ...]] = {
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (8, 13, 60, 49, 43),
    "beit_base_patch16_384.in22k_ft_in22k_in1k": (45, 7, -50, 28, -71),
    "beit_large_patch16_224.in22k_ft_in22k_in1k": (-35, 16, -6, -7, -19),
    "beit_large_patch16_384.in22k_ft_in22k_in1k": (-2, 3, -25, 1, -41),
    "beit_large_patch16_512.in22k_ft_in22k_in1k": (2, 7, -30, 3, -37),
    "beitv2_base_patch16_224.in1k_ft_in1k": (-62, 36, 20, 53, 34),
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": (-39, 1, -10, 12, 41),
    "beitv2_large_patch16_224.in1k_ft_in1k": (-31, 4, -8, 17, 11),
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k": (-37, 3, -19, -15, -21),
}

_BEIT = "microsoft/unilm beit/README.md"
_BEIT2 = "microsoft/unilm beit2/README.md"

# top1 and, where stated, top5 on ImageNet by the authors' README files; three digits are from their evaluation lines.
_AUTHORS: dict[str, tuple[str, float, float | None]] = {
    "beit_base_patch16_224.in22k_ft_in1k": (_BEIT, 83.7, 96.6),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (_BEIT, 85.2, 97.6),
    "beit_base_patch16_384.in22k_ft_in22k_in1k": (_BEIT, 86.820, 98.124),
    "beit_large_patch16_224.in22k_ft_in1k": (_BEIT, 86.0, 97.6),
    "beit_large_patch16_224.in22k_ft_in22k_in1k": (_BEIT, 87.396, 98.282),
    "beit_large_patch16_384.in22k_ft_in22k_in1k": (_BEIT, 88.408, 98.602),
    "beit_large_patch16_512.in22k_ft_in22k_in1k": (_BEIT, 88.600, 98.658),
    "beitv2_base_patch16_224.in1k_300e_ft_in1k": (_BEIT2, 85.0, None),
    "beitv2_base_patch16_224.in1k_ft_in1k": (_BEIT2, 85.5, 97.5),
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": (_BEIT2, 86.458, 97.978),
    "beitv2_large_patch16_224.in1k_300e_ft_in1k": (_BEIT2, 86.6, None),
    "beitv2_large_patch16_224.in1k_ft_in1k": (_BEIT2, 87.3, 98.2),
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k": (_BEIT2, 88.370, 98.578),
}

# mIoU, mAcc, aAcc on ADE20K by the same files: one scale, and several scales with flips.
_ADE20K: dict[str, tuple[str, tuple[float | None, ...], tuple[float | None, ...]]] = {
    "beit_base_patch16_640.in22k_ft_in22k_ade20k": (_BEIT, (53.61, 64.82, 84.62), (54.26, 65.28, 84.9)),
    "beit_large_patch16_640.in22k_ft_in22k_ade20k": (_BEIT, (56.7, None, None), (57.0, None, None)),
    "beitv2_base_patch16_512.in1k_ade20k": (_BEIT2, (53.1, None, None), ()),
    "beitv2_base_patch16_512.in1k_ft_in22k_ade20k": (_BEIT2, (53.5, None, None), ()),
    "beitv2_large_patch16_512.in1k_ade20k": (_BEIT2, (56.7, None, None), ()),
    "beitv2_large_patch16_512.in1k_ft_in22k_ade20k": (_BEIT2, (57.54, 68.78, 86.22), ()),
}


def published(model: str = "", data: str = "") -> list[Accuracy]:
    """List what is published, of one checkpoint and on one set or of all; timm's figures come first."""
    return [row for row in _ALL if model in ("", row.model) and data in ("", row.data)]


def headline(model: str) -> Accuracy | None:
    """Return the one figure to show beside a checkpoint's name: on the set it was made for, timm's if there is one."""
    return next((row for row in _ALL if row.model == model and row.data in ("imagenet", "ade20k", "digits")), None)


def _of_timm() -> list[Accuracy]:
    rows = []
    for model, pairs in _TIMM.items():
        config = PRETRAINED[model].data
        ranks = (None, *_TIMM_RANKS[model], None, None)
        for data, (top1, top5), rank in zip(list(DATA_SETS)[:8], pairs, ranks, strict=True):
            rows.append(
                Accuracy(
                    model=model,
                    data=data,
                    source=f"timm results/results-{data}.csv, October 2025",
                    img_size=config.input_size[2],
                    top1=top1,
                    top5=top5,
                    crop_pct=config.crop_pct,
                    interpolation=config.interpolation,
                    rank_diff=rank,
                )
            )
    return rows


def _of_authors() -> list[Accuracy]:
    figures = [(model, "imagenet", *row) for model, row in _AUTHORS.items()]
    figures.append(("beitv2_large_patch16_224.in1k_ft_in1k", "imagenet-r", _BEIT2, 69.940, 82.890))
    rows = []
    for model, data, source, top1, top5 in figures:
        size = PRETRAINED[model].data.input_size[2]
        rows.append(
            Accuracy(
                model=model,
                data=data,
                source=source,
                img_size=size,
                top1=top1,
                top5=top5,
                crop_pct=0.875 if size < 384 else 1.0,
                interpolation="bicubic",
            )
        )
    return rows


def _segmentations() -> list[Accuracy]:
    rows = []
    for model, (source, *both) in _ADE20K.items():
        for protocol, figures in zip(("single scale", "multi-scale and flip"), both, strict=True):
            if figures:
                miou, macc, aacc = figures
                size = PRETRAINED[model].data.input_size[2]
                rows.append(
                    Accuracy(
                        model=model,
                        data="ade20k",
                        source=source,
                        img_size=size,
                        miou=miou,
                        macc=macc,
                        aacc=aacc,
                        protocol=protocol,
                    )
                )
    return rows


# The small model's, on the held-out third of UCI's digits; the first row of results/digits.csv.
_DIGITS = Accuracy(
    model="beit_nano_patch4_32.digits",
    data="digits",
    source="results/digits.csv",
    img_size=32,
    top1=98.998,
    top5=100.0,
    crop_pct=1.0,
    interpolation="bicubic",
)

_ALL = [*_of_timm(), *_of_authors(), *_segmentations(), _DIGITS]
