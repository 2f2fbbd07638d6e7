"""The sections of a recipe of semantic segmentation: what masks stand for, how images and masks are augmented."""

from typing import Annotated, Literal

from pydantic import Field

from beitzoo.training.sections import Fraction, PartOfOne, RatioRange, Section


class LabelSection(Section):
    """What the pixels of masks stand for; see `images.label_maps.MaskLabels`.

    Attributes:
        classes: Names of the classes in the order of their numbers, or `ade20k`. Without it, the lines of a file
            `classes.txt` beside the images.
        reduce_zero_label: Number 0 stands for no class, and class k has number k + 1.
        ignore: Numbers that stand for no class, besides 255.
        colours: Of masks in RGB, the colour of each class; other colours stand for no class.
    """

    classes: tuple[str, ...] | Literal["ade20k"] | None = None
    reduce_zero_label: bool = False
    ignore: tuple[Annotated[int, Field(ge=0)], ...] = ()
    colours: dict[str, tuple[Annotated[int, Field(ge=0, le=255)], ...]] = Field(default_factory=dict)


class PixelAugment(Section):
    """The original's augmentation of an image with its mask, `semantic_segmentation/configs` of BEiT.

    Attributes:
        fit: Longer and shorter side that an image is fitted into before it is scaled; 4 times the network's side and
            its side if None.
        ratio: Range of the factor by which it is scaled then.
        max_share: A crop of which one class has a larger share is drawn again, up to ten times.
        hflip: Probability of a horizontal flip.
        distort: Change brightness, contrast, saturation and hue.
        mean: Per channel, of what the network is given and the trained model keeps; that of the model it starts from
            if None. The original has ImageNet's, also where the weights were trained with another.
        std: Per channel, likewise.
    """

    fit: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    ratio: RatioRange = (0.5, 2.0)
    max_share: PartOfOne = 0.75
    hflip: Fraction = 0.5
    distort: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None


class PixelInference(Section):
    """How a segmentation model looks at whole images; see `inference.segment.SegmentOptions`.

    Attributes:
        mode: The whole image at once, or window by window.
        short_side: Shorter side that images are resized to; the network's if None, 0 leaves them as they are.
        stride: Pixels from one window to the next; two thirds of the network's side if None, as in the original.
    """

    mode: Literal["whole", "slide"] = "slide"
    short_side: Annotated[int, Field(ge=0)] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None


class TrainSegmenter(Section):
    """The task of semantic segmentation.

    Attributes:
        kind: Names this task.
        labels: What the pixels of masks stand for.
        augment: What is done to training images and masks.
        auxiliary_weight: Of the auxiliary head's loss.
        frozen: Train the head only, on the features of the network as it is.
        bias_init_std: Spread of the relative position bias tables, if weights start random; 0 leaves them at zero.
        inference: How images are looked at when the model is measured.
    """

    kind: Literal["segment"]
    labels: LabelSection = LabelSection()
    augment: PixelAugment = PixelAugment()
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.4
    frozen: bool = False
    bias_init_std: Annotated[float, Field(ge=0)] = 0.0
    inference: PixelInference = PixelInference()
