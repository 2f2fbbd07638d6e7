"""The sections of a recipe for masked image modelling, and for the image tokenizers that it learns from."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from beitzoo.images.masks import MaskKind
from beitzoo.training.sections import (
    LOCAL_FOLDER,
    DataSection,
    FindableName,
    Fraction,
    FullPath,
    PartOfOne,
    RatioRange,
    Section,
    ShareRange,
    findable,
)
from beitzoo.zoo.checkpoints import HALF


class ViewSection(Section):
    """How the one view of an image that a tokenizer learns from is drawn; it has no mean and std, but is in [0, 1].

    Attributes:
        scale: Range of the crop's area, as shares of the image.
        ratio: Range of the crop's width by its height.
        jitter: Strength of random brightness, contrast and saturation.
        hflip: Probability of a horizontal flip.
        interpolation: Filter by which the crop is resized.
    """

    scale: ShareRange = (0.08, 1.0)
    ratio: RatioRange = (3 / 4, 4 / 3)
    jitter: Annotated[float, Field(ge=0)] = 0.0
    hflip: Fraction = 0.5
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"


class ViewsSection(ViewSection):
    """How the two views of an image are drawn from one crop box; sizes are those of the network and the tokenizer.

    `interpolation` is the filter of the network's view; that of the other is the tokenizer's.

    Attributes:
        jitter: Strength of random brightness, contrast and saturation.
        mean: Of the network's view, per channel.
        std: Of the network's view, per channel.
    """

    jitter: Annotated[float, Field(ge=0)] = 0.4
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


class MaskSection(Section):
    """Which patches are masked; see `images.masks.Masking`, whose grid is the network's."""

    kind: MaskKind = "block"
    count: Annotated[int, Field(ge=1)] = 75
    exact: bool = False
    min_block: Annotated[int, Field(ge=1)] = 16
    max_block: Annotated[int, Field(ge=1)] | None = None
    min_aspect: PartOfOne = 0.3


class ProbeSection(Section):
    """A small labelled set on which frozen features are probed while pretraining goes on.

    Attributes:
        data: The set; its `train` part fits the probes, its `test` part measures them.
        epochs: Epochs between two probes.
        neighbours: Of the kNN probe.
    """

    data: DataSection
    epochs: Annotated[int, Field(ge=1)] = 10
    neighbours: Annotated[int, Field(ge=1)] = 20


class Pretrain(Section):
    """The task of masked image modelling.

    Attributes:
        kind: Names this task.
        tokenizer: Name or folder of the image tokenizer.
        tokens: Folder that `beitzoo tokenize` wrote; views and visual tokens come from there, and no tokenizer runs.
        views: How both views of an image are drawn.
        mask: Which patches are masked.
        bias_init_std: Spread of the relative position bias tables, if weights start random; 0 leaves them at zero.
        picture_epochs: Epochs between two pictures of reconstructions; 0 for none.
        probe: Labelled images for a linear and a kNN probe now and then.
    """

    kind: Literal["pretrain"]
    tokenizer: FindableName
    tokens: FullPath | None = None
    views: ViewsSection = ViewsSection()
    mask: MaskSection = MaskSection()
    bias_init_std: Annotated[float, Field(ge=0)] = 0.0
    picture_epochs: Annotated[int, Field(ge=0)] = 1
    probe: ProbeSection | None = None


class TrainTokenizer(Section):
    """The task of training a vector-quantised tokenizer (VQ-KD); the model section names the tokenizer.

    Attributes:
        kind: Names this task.
        teacher: What the decoder predicts: `pixels`, or the patch features of a model, `timm:NAME`,
            `transformers:NAME` or `local-dir:PATH`.
        projection: Map the teacher's features into the space that its images share with texts, as BEiT v2 does with
            CLIP's.
        views: Crop, flip and jitter of the one view.
        commitment: Weight of the distance from features to their codes.
        codebook_decay: Of the moving average that codes are.
        kmeans_init: Start the codebook from k-means on the first batch.
        restart_codes: Replace a code that was not used in this many updates by a feature of the batch; 0 for never.
    """

    kind: Literal["tokenizer"]
    teacher: Annotated[str, AfterValidator(lambda name: findable(name) if name.startswith(LOCAL_FOLDER) else name)]
    projection: bool = False
    views: ViewSection = ViewSection()
    commitment: Annotated[float, Field(ge=0)] = 1.0
    codebook_decay: Fraction = 0.99
    kmeans_init: bool = True
    restart_codes: Annotated[int, Field(ge=0)] = 0
