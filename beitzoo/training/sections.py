"""The sections of a recipe: what all tasks have, and one for each task. Closed: a misspelt key is an error.

Those of segmentation are in `training.segment_sections`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from beitzoo.errors import closest
from beitzoo.files import full_path
from beitzoo.zoo.registry import is_model
from beitzoo.zoo.tokenizers import is_tokenizer

Fraction = Annotated[float, Field(ge=0, lt=1)]
PartOfOne = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def _in_order(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"{list(limits)} is no range; write the smaller number first")
    return limits


ShareRange = Annotated[tuple[PartOfOne, PartOfOne], AfterValidator(_in_order)]
RatioRange = Annotated[tuple[Positive, Positive], AfterValidator(_in_order)]
# `~` is the home folder, and a run that goes on elsewhere means the same files.
FullPath = Annotated[Path, AfterValidator(lambda path: full_path(path).absolute())]
LOCAL_FOLDER = "local-dir:"  # before the path of a folder, in names
# Arguments of `create_model` that the recipe says elsewhere, or that make something else than a classifier.
_NOT_OVERRIDES = {
    "model_name",
    "pretrained",
    "features_only",
    "checkpoint_path",
    "cache_dir",
    "device",
    "dtype",
    "head",
}


def findable(name: str) -> str:
    """Return the name of a model or a tokenizer; of a path that is there the full one, as it is used from elsewhere."""
    if is_model(name) or is_tokenizer(name):
        return name
    prefix = LOCAL_FOLDER if name.startswith(LOCAL_FOLDER) else ""
    path = full_path(name.removeprefix(prefix))
    return f"{prefix}{path.absolute()}" if path.exists() else name


FindableName = Annotated[str, AfterValidator(findable)]


class Section(BaseModel):
    """A closed table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _know_keys(cls, values: Any) -> Any:
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise ValueError(f"there is no key {unknown[0]!r}; {closest(unknown[0], cls.model_fields)}")
        return values


class ModelSection(Section):
    """What is trained.

    Attributes:
        name: As in `create_model`.
        pretrained: Start from the weights of that name rather than from random ones.
        checkpoint: Start from this file of the same network instead.
        overrides: Fields of `BeitConfig`, and of `SegmenterConfig` where pixels are classified; the number of classes
            comes from the data.
    """

    name: FindableName
    pretrained: bool = False
    checkpoint: FullPath | None = None
    overrides: dict[str, int | float | bool | str | list[int]] = {}

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in overrides:
            raise ValueError("the number of classes comes from the data; leave num_classes out")
        for name in _NOT_OVERRIDES & overrides.keys():
            raise ValueError(f"{name} is no field of the network; leave it out")
        return overrides

    @property
    def is_random(self) -> bool:
        """Whether training starts from random weights."""
        return not self.pretrained and self.checkpoint is None


class DataSection(Section):
    """What it is trained and measured on.

    Attributes:
        source: `digits`; `folder` for images in one subfolder per class; `images` for a folder of images without
            labels, however deep; `parquet` for tables in the hub's form (columns `image` and perhaps `label`);
            `webdataset` for tar files. Of images with masks `annotations`, a folder with `images` and `annotations` in
            it as ADE20K has; `pairs`, a CSV with the columns `image`, `mask` and perhaps `part`; or `parquet`.
        path: That folder, or one file of these.
        test_path: Held-out images of the same form; without it they are drawn from `path`. Images that come in parts
            are not drawn: their `test` is held out and their `validation` chooses; without a `test`, as in ADE20K,
            `validation` is what is held out, and only `val_fraction` gives images to choose by.
        test_fraction: Share that is held out and used once, at the end; drawn evenly from all classes. A third if
            none is given and a classifier is trained without `test_path`, else 0.
        val_fraction: Share of the rest by which the best checkpoint is chosen. A tenth if none is given and a
            classifier is trained, else 0.
        train_per_class: Train on only this many images of each class; 0 for all.
        split_seed: Draws all of these.
        label_seed: Draws the images that `train_per_class` keeps, if it is given: several draws of few labels with the
            same images held out.
    """

    source: Literal["digits", "folder", "images", "csv", "parquet", "arrow", "webdataset", "annotations", "pairs"]
    path: FullPath | None = None
    test_path: FullPath | None = None
    test_fraction: Fraction | None = None
    val_fraction: Fraction | None = None
    train_per_class: Annotated[int, Field(ge=0)] = 0
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    label_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class AffineAugment(Section):
    """Small random shifts, turns and stretches of the whole image, for data that cropping would destroy.

    Attributes:
        kind: Names this kind.
        rotate: Largest turn, degrees.
        translate: Largest shift, as a share of the side.
        scale: Largest change of size, as a share.
        shear: Largest shear, degrees.
    """

    kind: Literal["affine"]
    rotate: float = 0.0
    translate: Fraction = 0.0
    scale: Fraction = 0.0
    shear: float = 0.0


class CropAugment(Section):
    """timm's training transform: random resized crops, flips, colour, RandAugment, erasing.

    Attributes:
        kind: Names this kind.
        scale: Range of the crop's area, as shares of the image.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of random brightness, contrast and saturation.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5-inc1`; empty for none.
        re_prob: Probability of random erasing.
        re_mode: What the erased part is filled with: black, one random colour, or a random colour for each pixel.
    """

    kind: Literal["crop"] = "crop"
    scale: ShareRange = (0.08, 1.0)
    hflip: Fraction = 0.5
    color_jitter: Annotated[float, Field(ge=0)] = 0.4
    auto_augment: str = ""
    re_prob: Fraction = 0.0
    re_mode: Literal["const", "rand", "pixel"] = "const"


class TrainSection(Section):
    """How any task is trained.

    Attributes:
        epochs: Passes over the training images.
        updates: Updates of the whole run, instead of `epochs`; the last epoch is then cut short.
        batch_size: Images per update, of all processes together.
        accumulation: Passes into which each process splits its share of an update; memory is for one of them. The
            result is the same, but for networks with batch norms (those of segmentation), which see one at a time, and
            for mixup, which mixes within one.
        lr: Peak learning rate of the head; see `layer_decay`.
        schedule: How the learning rate falls: along a cosine, or along a line as mmsegmentation's `poly` of power 1.
        min_lr: Learning rate at the end.
        warmup_epochs: Of a linear rise from 0, which ends at `lr`.
        warmup_updates: The same, counted in updates; instead of `warmup_epochs` if it is not 0.
        weight_decay: Of matrices; what is not decayed is the model's to say (`no_weight_decay`), besides vectors.
        weight_decay_end: Weight decay at the end of a cosine from `weight_decay`, update by update; constant if None.
        betas: Of AdamW.
        layer_decay: Factor on the learning rate per layer, from the head down. Patch embedding and tokens are layer 0,
            block i is layer i + 1, and all else is of the layer of the head.
        layer_rule: Where the two originals differ: a shared bias table is of the head's layer in `unilm`, and of layer
            0 in `timm`; a norm before the pooling likewise, and of the last block's. Networks to be fine-tuned have
            neither as a rule, so that both are the same.
        decay_bias_tables: Decay the relative position bias tables too, as unilm did; timm does not.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        bias_lr_scale: Factor on the learning rate of the relative position bias tables. Without absolute
            positions a network that starts at zero tables sees a bag of patches until they have grown; 1 is
            right for weights that have.
        ema_decay: Of the moving average of the weights, which is then what is validated and saved; 0 for none.
        precision: Of the forward pass.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Use `torch.compile`; it pays on GPUs, and takes a while to begin.
        val_epochs: Epochs between two validations; the last epoch has one always.
        patience: Validations without a better model after which the run ends, its best model being what it is; 0 goes
            on to the end. Learning rates fall as if it did.
        seed: Of weights, order, augmentation and stochastic depth.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    updates: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)]
    accumulation: Annotated[int, Field(ge=1)] = 1
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "poly"] = "cosine"
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    layer_rule: Literal["unilm", "timm"] = "unilm"
    decay_bias_tables: bool = False
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    bias_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_checkpointing: bool = False
    compile: bool = False
    val_epochs: Annotated[int, Field(ge=1)] = 1
    patience: Annotated[int, Field(ge=0)] = 0
    seed: int = 0

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("give either epochs or updates, which say how long the run is")
        return self

    @model_validator(mode="after")
    def _check_weight_decay(self) -> Self:
        if self.weight_decay_end and not self.weight_decay:
            raise ValueError("weight_decay_end needs a weight_decay above 0 to go on from")
        return self

    def count_updates(self, updates_per_epoch: int) -> int:
        """Return the updates of the whole run."""
        if self.updates is not None:
            return self.updates
        assert self.epochs is not None
        return self.epochs * updates_per_epoch

    def count_epochs(self, updates_per_epoch: int) -> int:
        """Return the epochs of the whole run, the last of which may be cut short."""
        return -(-self.count_updates(updates_per_epoch) // updates_per_epoch)


class RunSection(Section):
    """How the work is done. It changes nothing in the result, and may be another when a run goes on.

    Attributes:
        workers: Processes that load images, for each that trains; 0 loads them in the training process.
        sharding: What several processes that train share out among them: nothing, so that each has all weights and
            moments (DDP), or all that is trained, with its gradients, moments and averages (`full`, FSDP2). That takes
            less memory and more sending; a validation has all weights for a while.
        log_updates: Updates between two lines of the log.
        save_epochs: Epochs between two saved states, from which an interrupted run goes on.
        save_updates: Updates between two saved states, besides those at the end of epochs; 0 for none.
        tensorboard: Write the log for TensorBoard too.
        pictures: Draw the log and, of a classifier, its confusions at the end.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    sharding: Literal["none", "full"] = "none"
    log_updates: Annotated[int, Field(ge=1)] = 10
    save_epochs: Annotated[int, Field(ge=1)] = 1
    save_updates: Annotated[int, Field(ge=0)] = 0
    tensorboard: bool = True
    pictures: bool = True


class Lora(Section):
    """Low-rank adapters: a frozen matrix W of a linear becomes W + (alpha / rank) B A, of which A and B are trained.

    Hu et al. 2021, "LoRA" (https://arxiv.org/abs/2106.09685). `beitzoo.training.lora` says what is saved.

    Attributes:
        rank: Rows of A and columns of B. That of peft's guide to image classification, whose ViT is as wide as a base
            network.
        alpha: Keep it when the rank changes, and the learning rate may stay (section 4.1 of the paper). As the guide.
        dropout: Share of each adapter's inputs that is dropped in training. 0.1 in the guide; none unless asked for.
        targets: The linears of each block that get an adapter. All of them: adapters on queries and values alone do not
            reach what full fine-tuning does, whatever their rank (Dettmers et al. 2023, "QLoRA", section 4). Queries,
            keys and values are one linear here, so they share one A.
        besides: What else of the adapted blocks is trained: nothing, or `all` but the matrices of the linears. That is
            biases (those of queries and values too), norms, layer scales and bias tables, 3 parameters in 1,000 of a
            base network; worth it where the input size changed.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 16
    dropout: Fraction = 0.0
    targets: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], Field(min_length=1)] = (
        "qkv",
        "proj",
        "fc1",
        "fc2",
    )
    besides: Literal["none", "all"] = "none"


class Finetune(Section):
    """The task of training a classifier.

    Attributes:
        kind: Names this task.
        labels: How many classes an image has: one, learned by cross-entropy and judged by top-1; or any number of them,
            `many`, learned by binary cross-entropy and judged by mean average precision.
        augment: What is done to training images.
        label_smoothing: Share of the target that is spread over all classes; of many labels each target moves by half
            of it towards 0.5, as timm's `BinaryCrossEntropy` does it.
        mixup: Mix pairs of images with a share from a beta distribution of this parameter; 0 for no mixup.
        cutmix: Cut a rectangle of one image into the other, whose area is drawn likewise; 0 for no CutMix.
        mixup_prob: Share of the batches that are mixed, one way or the other.
        mixup_switch_prob: Share of these that are mixed by CutMix, if both are on.
        balance: What is done for rare classes. `loss` weights each image by the inverse of how many its class has, 1 on
            average; of many labels the loss of images that have one, by how many have it not for each that has it.
            `sampling` shows as many images of each class in an epoch, those of rare ones several times.
        freeze_blocks: Train neither the patch embedding, tokens and positions nor the first so many blocks, or `all`
            of them; in these nothing is dropped. Everything is trained if None.
        lora: Train adapters in the blocks, the norm behind them and the head, and nothing else; blocks that
            `freeze_blocks` names get none. Everything is trained if None.
        crop_pct: Share of the shorter side that a network sees when it is measured; the trained model keeps it. That of
            the model it starts from if None.
        bias_init_std: Spread of the relative position bias tables, if weights start random; 0 leaves them at zero.
    """

    kind: Literal["finetune"] = "finetune"
    labels: Literal["one", "many"] = "one"
    augment: Annotated[AffineAugment | CropAugment, Field(discriminator="kind")] = CropAugment()
    label_smoothing: Fraction = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    balance: Literal["none", "loss", "sampling"] = "none"
    freeze_blocks: Annotated[int, Field(ge=0)] | Literal["all"] | None = None
    lora: Lora | None = None
    crop_pct: PartOfOne | None = None
    bias_init_std: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _check_balance(self) -> Self:
        if self.labels == "many" and self.balance == "sampling":
            raise ValueError(
                "an image with several labels cannot be shown more often for one of them alone; with labels = 'many' "
                "balance can be 'loss' or 'none'"
            )
        return self

    @field_validator("augment", mode="before")
    @classmethod
    def _crop_by_default(cls, augment: Any) -> Any:
        return {"kind": "crop", **augment} if isinstance(augment, dict) else augment
