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
from beitzoo.zoo.networks import BeitConfig, MimConfig, override, plain

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
        trained: The head of the checkpoint.
        mim: The head of a masked image model, if that is wanted.
        convert: From the tensors of the file, under our names, to those that the stored network loads strictly.
    """

    stored: BeitConfig
    overrides: Mapping[str, Any]
    trained: Head
    mim: MimConfig | None
    convert: Callable[[State], State]

    def __post_init__(self) -> None:
        _ = self.wanted  # a wrong override is an error before anything is downloaded

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
    def head(self) -> Head:
        """The head of the loaded network: that of the checkpoint with its labels, if it is the same."""
        if self.mim is not None:
            trained = self.trained if isinstance(self.trained, Mim) else Mim()
            same = self.mim.vocab_size == trained.network.vocab_size
            return Mim(network=self.mim, tokenizer=trained.tokenizer if same else None)
        if isinstance(self.trained, Classify) and self.trained.num_classes == self.stored.num_classes:
            return self.trained
        return Classify(num_classes=self.stored.num_classes)


def make_plan(
    name: str, config: BeitConfig, trained: Head, overrides: Mapping[str, Any], head: type[Mim] | None = None
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
    if head is not None and classes is not None:
        raise InvalidOptionError(f"num_classes={classes} and head='mim' exclude each other; give one of them.")
    wanted = head or (type(trained) if classes is None else Classify if classes else None)
    adaptation = ADAPTATIONS.get((type(trained), wanted))
    if adaptation is None and head is not None:
        raise UnsupportedError(
            f"{name} was trained with a head for {_JOBS[type(trained)]}; there is no way from there to a masked image "
            "model. Name the architecture alone, for random values or for its checkpoint of masked image modelling."
        )
    if adaptation is None:
        raise UnsupportedError(
            f"{name} was trained with a head for {_JOBS[type(trained)]}, which is not built here. Give num_classes=0 "
            "for its features, num_classes=N for a classifier to fine-tune, or features_only=True for maps."
        )
    stored = adaptation.config(config)
    mim = None
    if wanted is Mim:
        fields = {name: overrides[name] for name in MimConfig.__dataclass_fields__.keys() & overrides.keys()}
        overrides = {name: value for name, value in overrides.items() if name not in fields}
        given = {name: plain(value) for name, value in fields.items() if value is not None}
        mim = replace(trained.network if isinstance(trained, Mim) else MimConfig(), **given)
    return Plan(stored, overrides, trained, mim, lambda state: adaptation.state(state, stored))


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
    return replace(plan, stored=stored)


def _as_it_is(config: BeitConfig) -> BeitConfig:
    return config


def _all_of_it(state: State, _: BeitConfig) -> State:
    return state


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
    kept = {name: t for name, t in _without_mim_head(state, config).items() if not _ONLY_PRETRAINING.match(name)}
    if shared in state:
        blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        kept |= {f"blocks.{block}.attn.{_TABLE}": state[shared].clone() for block in blocks}
    return _with_fresh_norm(kept)


def _with_mim_head(state: State, _: BeitConfig) -> State:
    return layouts.add_backbone(state, _MIM_HEAD)


def _without_mim_head(state: State, _: BeitConfig) -> State:
    return {name: tensor for name, tensor in state.items() if not _MIM_HEAD.match(name)}


def _backbone_of_segmenter(state: State, config: BeitConfig) -> State:
    """Leave out decode heads and neck; the backbone of a segmentation model was trained without a last norm."""
    kept = {name: tensor for name, tensor in state.items() if not _SEGMENT_HEAD.match(name)}
    return _with_fresh_norm(kept) if config.norm_after_pooling and "fc_norm.weight" not in kept else kept


def _with_fresh_norm(state: State) -> State:
    if "cls_token" not in state:
        return state
    like = state["cls_token"]
    width = like.shape[-1]
    return {**state, "fc_norm.weight": like.new_ones(width), "fc_norm.bias": like.new_zeros(width)}


_MIM_HEAD = re.compile(r"(lm_head|cls_pt_layers|cls_pt_norm|cls_pt_lm_head)\.")
_SEGMENT_HEAD = re.compile(r"(decode_head|auxiliary_head|fpn[1-4]|fpn)\.")
_ONLY_PRETRAINING = re.compile(rf"(norm\.|mask_token|rel_pos_bias\.{_TABLE})")
_JOBS: dict[type[Head], str] = {Mim: "visual tokens", Segment: "segmentation"}

ADAPTATIONS: dict[tuple[type[Head], Wanted], Adaptation] = {
    (Classify, Classify): Adaptation(config=_as_it_is, state=_all_of_it),
    (Classify, None): Adaptation(config=_as_it_is, state=_all_of_it),
    (Classify, Mim): Adaptation(config=_for_pretraining, state=_with_mim_head),
    (Mim, Mim): Adaptation(config=_as_it_is, state=_with_mim_head),
    (Mim, None): Adaptation(config=_as_it_is, state=_without_mim_head),
    (Mim, Classify): Adaptation(config=_for_finetuning, state=_for_finetuning_state),
    (Segment, None): Adaptation(config=_as_it_is, state=_backbone_of_segmenter),
    (Segment, Classify): Adaptation(config=_as_it_is, state=_backbone_of_segmenter),
}
