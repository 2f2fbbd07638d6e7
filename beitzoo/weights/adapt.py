"""How a checkpoint becomes what is asked for: one row for each pair of stored head and wanted head.

A row has two halves, side by side: what changes in the record of the network, and what changes in its tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from beitzoo.errors import InvalidOptionError, UnsupportedError
from beitzoo.weights import layouts
from beitzoo.zoo.checkpoints import Classify, Head, Mim, Segment
from beitzoo.zoo.networks import BeitConfig, HeadConfig, MimConfig, SegmenterConfig, override, plain

State = Mapping[str, Tensor]
# The kind of head that is wanted; None for the backbone alone.
Wanted = type[Head] | None

_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Adaptation:
    """One row: what turns a checkpoint with one head into the start of a model with another.

    Attributes:
        config: From the network of the checkpoint to the one that is loaded.
        state: From the tensors of the file, under our names, to those that are loaded, given that network.
    """

    config: Callable[[BeitConfig], BeitConfig]
    state: Callable[[State, BeitConfig], State]


@dataclass(frozen=True)
class Plan:
    """What is loaded, and what it becomes.

    Attributes:
        stored: The network of the file, after its row of the table.
        overrides: What was asked for instead of its fields, in timm's spellings; `num_classes` 0 for no head.
        head_overrides: The same for what is around the backbone.
        trained: The head of the checkpoint.
        convert: From the tensors of the file, under our names, to those that the stored network loads strictly.
        stored_head: What is around the backbone, if anything is wanted there: as in the file, or as it starts.
    """

    stored: BeitConfig
    overrides: Mapping[str, Any]
    head_overrides: Mapping[str, Any]
    trained: Head
    convert: Callable[[State], State]
    stored_head: HeadConfig | None = None

    def __post_init__(self) -> None:
        _ = self.wanted, self.wanted_head  # a wrong override is an error before anything is downloaded

    @property
    def wanted(self) -> BeitConfig:
        """The network that was asked for."""
        return override(self.stored, **self.overrides)

    @property
    def loaded(self) -> BeitConfig:
        """The wanted network with the shapes of the file, to which it is fitted after loading."""
        shapes = ("img_size", "patch_size", "in_chans", "num_classes", "global_pool")
        return replace(self.wanted, **{name: getattr(self.stored, name) for name in shapes})

    @property
    def wanted_head(self) -> HeadConfig | None:
        """What was asked for around the backbone."""
        return self.stored_head and replace(self.stored_head, **self.head_overrides)

    @property
    def has_heads(self) -> bool:
        """Whether the checkpoint was trained with the heads for pixels that are wanted."""
        trained, wanted = self.trained, self.wanted_head
        return (
            isinstance(trained, Segment)
            and isinstance(wanted, SegmenterConfig)
            and trained.network is not None
            and trained.network.decoder == wanted.decoder
        )

    @property
    def loaded_head(self) -> HeadConfig | None:
        """The same with the classes of pixels in the file, to which it is fitted after loading."""
        wanted = self.wanted_head
        if isinstance(wanted, SegmenterConfig) and isinstance(self.stored_head, SegmenterConfig):
            return replace(wanted, num_classes=self.stored_head.num_classes)
        return wanted

    @property
    def head(self) -> Head:
        """The head of the loaded network: that of the checkpoint with its labels, if it is the same."""
        head = self.loaded_head
        if isinstance(head, MimConfig):
            mim = self.trained if isinstance(self.trained, Mim) else Mim()
            same = head.vocab_size == mim.network.vocab_size
            return Mim(network=head, tokenizer=mim.tokenizer if same else None)
        if isinstance(head, SegmenterConfig):
            trained = self.trained if isinstance(self.trained, Segment) and self.has_heads else Segment(network=None)
            return Segment(network=head, labels=trained.labels if trained.num_classes == head.num_classes else None)
        if isinstance(self.trained, Classify) and self.trained.num_classes == self.stored.num_classes:
            return self.trained
        return Classify(num_classes=self.stored.num_classes)


def make_plan(
    name: str, config: BeitConfig, trained: Head, overrides: Mapping[str, Any], head: type[Mim | Segment] | None = None
) -> Plan:
    """Look up how a checkpoint becomes what is asked for.

    Args:
        name: What the checkpoint is called in an error.
        config: Its network.
        trained: Its head.
        overrides: Fields of the wanted network, in timm's spellings; without `num_classes`, the checkpoint's head.
        head: The wanted head, if it is to be another than that of the checkpoint.

    Raises:
        UnsupportedError: There is no row for the two heads.
        UserError: An override is unknown or out of range.
    """
    classes = overrides.get("num_classes")
    if head is not None and classes is not None and (head is Mim or not classes):
        raise InvalidOptionError(
            f"num_classes={classes} and head={_WORDS[head]!r} exclude each other; give one of them."
        )
    wanted = head or _wanted(trained, classes)
    adaptation = ADAPTATIONS.get((type(trained), wanted))
    if adaptation is None:
        raise UnsupportedError(
            f"{name} was trained with a head for segmentation; there is no way from there to a masked image model. "
            "Name the architecture alone, for random values or for its checkpoint of masked image modelling."
        )
    stored = adaptation.config(config)

    def convert(state: State) -> State:
        return adaptation.state(state, stored)

    if wanted is Mim:
        around = trained.network if isinstance(trained, Mim) else MimConfig()
        return Plan(stored, *_split(overrides, around), trained, convert, around)
    if wanted is Segment:
        return _plan_for_pixels(name, stored, overrides, trained, convert)
    return Plan(stored, overrides, {}, trained, convert)


def _plan_for_pixels(
    name: str, stored: BeitConfig, overrides: Mapping[str, Any], trained: Head, convert: Callable[[State], State]
) -> Plan:
    """Plan a segmentation model: with the heads of the checkpoint or, if it has no such heads, with fresh ones."""
    around = trained.network if isinstance(trained, Segment) else None
    if around is None or overrides.get("decoder") not in (None, around.decoder):
        around = SegmenterConfig()
    plan = Plan(stored, *_split(overrides, around), trained, convert, around)
    head = plan.wanted_head
    assert isinstance(head, SegmenterConfig)
    head.of_depth(plan.wanted.depth)
    if not plan.has_heads and "num_classes" not in plan.head_overrides:
        raise InvalidOptionError(
            f"{name} was not trained with the decoder {head.decoder!r} for segmentation, and how many classes a fresh "
            "one shall tell apart was not said. Give num_classes=N with head='segment', or num_classes=0 for the "
            "backbone."
        )
    return replace(
        plan,
        convert=lambda state: convert(_heads_for(head, state)),
        stored_head=plan.stored_head if plan.has_heads else head,
    )


def _heads_for(head: SegmenterConfig, state: State) -> State:
    """Leave out the heads of another decoder, and an auxiliary head that is not wanted."""
    decoder = "upernet" if any(map(layouts.NECK.match, state)) else "linear"
    if decoder != head.decoder:
        return _without(state, layouts.SEGMENT_HEAD)
    return state if head.has_auxiliary else _without(state, _AUXILIARY_HEAD)


def _wanted(trained: Head, classes: object) -> Wanted:
    """Return the kind of head that is meant where none is named; classes are of what the checkpoint names."""
    if classes is None:
        return type(trained)
    return None if not classes else Segment if isinstance(trained, Segment) else Classify


def _split(overrides: Mapping[str, Any], around: HeadConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Part what was asked for into fields of the backbone and fields of what is around it."""
    names = around.__dataclass_fields__.keys() & overrides.keys()
    given = {name: plain(overrides[name]) for name in names if overrides[name] is not None}
    return {name: value for name, value in overrides.items() if name not in names}, given


def fit_to_file(plan: Plan, state: State) -> Plan:
    """Correct a plan by the classes, channels, size and norm of a user's own file, which need not be the row's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in layouts.strip_backbone(state).items()}
    stored = plan.stored
    if len(shapes.get("head.weight", ())) == 2 and stored.num_classes:
        stored = replace(stored, num_classes=shapes["head.weight"][0])
    elif "head.weight" not in shapes and plan.overrides.get("num_classes") is not None:
        stored = replace(stored, num_classes=0)  # a backbone; what head it gets was said
    if len(shapes.get("patch_embed.proj.weight", ())) == 4:
        stored = replace(stored, in_chans=shapes["patch_embed.proj.weight"][1])
    # A table's length does not say the sides of its grid, so only a size that was asked for is tried.
    wanted = override(stored, **plan.overrides)
    tables = {shape[0] for name, shape in shapes.items() if name.endswith(_TABLE)}
    if tables == {wanted.bias_rows} or shapes.get("pos_embed", ())[1:2] == (wanted.num_tokens,):
        stored = replace(stored, img_size=wanted.img_size, patch_size=wanted.patch_size)
    pooled = wanted.norm_after_pooling
    if pooled != stored.norm_after_pooling and ("fc_norm.weight" in shapes, "norm.weight" in shapes) == (
        pooled,
        not pooled,
    ):
        stored = replace(stored, global_pool=wanted.global_pool, use_fc_norm=pooled)
    return replace(plan, stored=stored, stored_head=_fit_head(plan.stored_head, shapes))


def _fit_head(stored: HeadConfig | None, shapes: Mapping[str, tuple[int, ...]]) -> HeadConfig | None:
    """Correct the classes of pixels by those of a file."""
    classes = shapes.get("decode_head.conv_seg.weight", ())
    if isinstance(stored, SegmenterConfig) and len(classes) == 4 and classes[0]:
        return replace(stored, num_classes=classes[0])
    return stored


def _as_it_is(config: BeitConfig) -> BeitConfig:
    return config


def _all_of_it(state: State, _: BeitConfig) -> State:
    return state


def _without(state: State, unwanted: re.Pattern[str]) -> State:
    return {name: tensor for name, tensor in state.items() if not unwanted.match(name)}


def _for_finetuning(config: BeitConfig) -> BeitConfig:
    """Give every block a table of its own and put the last norm behind the pooling, as unilm does to fine-tune."""
    return replace(
        config,
        use_rel_pos_bias=config.use_rel_pos_bias or config.use_shared_rel_pos_bias,
        use_shared_rel_pos_bias=False,
        global_pool="avg",
        use_fc_norm=True,
        use_mask_token=False,
    )


def _for_pretraining(config: BeitConfig) -> BeitConfig:
    """Give all blocks one table and put the last norm on the tokens, as unilm does to pretrain."""
    return replace(
        config,
        num_classes=0,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
        global_pool="avg",
        use_fc_norm=False,
        use_mask_token=True,
    )


def _for_finetuning_state(state: State, config: BeitConfig) -> State:
    """Copy the shared table to every block, leave out mask token and norm; the norm behind the pooling is fresh."""
    shared = f"rel_pos_bias.{_TABLE}"
    kept = {**_without(_without_mim_head(state, config), _ONLY_PRETRAINING)}
    if shared in state:
        blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        kept |= {f"blocks.{block}.attn.{_TABLE}": state[shared].clone() for block in blocks}
    return _with_fresh_norm(kept)


def _with_mim_head(state: State, _: BeitConfig) -> State:
    return layouts.add_backbone(state, _MIM_HEAD)


def _without_mim_head(state: State, _: BeitConfig) -> State:
    return _without(state, _MIM_HEAD)


def _for_segmentation(config: BeitConfig) -> BeitConfig:
    """Take head, pooling and mask token off: a segmentation model reads its blocks without a last norm."""
    return replace(config, num_classes=0, global_pool="", use_fc_norm=False, use_mask_token=False)


def _for_segmentation_state(state: State, _: BeitConfig) -> State:
    """Leave out what no pixel depends on, a norm behind the blocks and a mask token, and sort what is the heads'."""
    return layouts.add_segmenter(_without(state, _NOT_FOR_PIXELS))


def _backbone_config_of_segmenter(config: BeitConfig) -> BeitConfig:
    return config if config.global_pool else replace(config, global_pool="avg", use_fc_norm=True)


def _backbone_of_segmenter(state: State, config: BeitConfig) -> State:
    """Leave out decode heads and neck; the backbone of a segmentation model was trained without a last norm."""
    kept = _without(state, layouts.SEGMENT_HEAD)
    return _with_fresh_norm(kept) if config.norm_after_pooling and "fc_norm.weight" not in kept else kept


def _with_fresh_norm(state: State) -> State:
    if "cls_token" not in state:
        return state
    like = state["cls_token"]
    width = like.shape[-1]
    return {**state, "fc_norm.weight": like.new_ones(width), "fc_norm.bias": like.new_zeros(width)}


_MIM_HEAD = re.compile(r"(lm_head|cls_pt_layers|cls_pt_norm|cls_pt_lm_head)\.")
_AUXILIARY_HEAD = re.compile(r"auxiliary_head\.")
_CLASS_HEAD = re.compile(r"head\.")
_NOT_FOR_PIXELS = re.compile(r"((fc_)?norm\.|mask_token$)")
_ONLY_PRETRAINING = re.compile(rf"(norm\.|mask_token|rel_pos_bias\.{_TABLE})")
_WORDS: dict[type[Head], str] = {Mim: "mim", Segment: "segment"}

ADAPTATIONS: dict[tuple[type[Head], Wanted], Adaptation] = {
    (Classify, Classify): Adaptation(config=_as_it_is, state=_all_of_it),
    (Classify, None): Adaptation(config=_as_it_is, state=_all_of_it),
    (Classify, Mim): Adaptation(config=_for_pretraining, state=_with_mim_head),
    (Mim, Mim): Adaptation(config=_as_it_is, state=_with_mim_head),
    (Mim, None): Adaptation(config=_as_it_is, state=_without_mim_head),
    (Mim, Classify): Adaptation(config=_for_finetuning, state=_for_finetuning_state),
    (Segment, Segment): Adaptation(config=_for_segmentation, state=_for_segmentation_state),
    (Segment, None): Adaptation(config=_backbone_config_of_segmenter, state=_backbone_of_segmenter),
    (Classify, Segment): Adaptation(
        config=_for_segmentation,
        state=lambda state, config: _for_segmentation_state(_without(state, _CLASS_HEAD), config),
    ),
    (Mim, Segment): Adaptation(
        config=lambda config: _for_segmentation(_for_finetuning(config)),
        state=lambda state, config: _for_segmentation_state(_for_finetuning_state(state, config), config),
    ),
}
