"""Models out to files: for beitzoo and timm, for transformers, and for the original's scripts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from beitzoo.errors import InvalidOptionError, InvalidValueError
from beitzoo.files import write_text
from beitzoo.models.beit import Beit
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.position import relative_position_index
from beitzoo.models.random_tokenizer import RandomTokenizer
from beitzoo.models.segmentation import Segmenter
from beitzoo.models.tokenizers import Dvae, Vqkd
from beitzoo.weights import checkpoint, layouts
from beitzoo.zoo.checkpoints import Classify, Head, Mim, PretrainedConfig, Segment
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import BeitConfig

# `folder` (pydantic) is imported by the functions that need it: a model is often made without it.

_logger = logging.getLogger(__name__)


def save_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Save weights and config to a folder that `create_model` reads, here and in timm.

    What timm would read as something else it refuses ("Unknown model"), and a warning says why: a mask token, a
    larger epsilon, and the few oblong grids whose bias tables it would scramble.

    Adapters of peft are merged first: `save_pretrained(peft_model.merge_and_unload(), directory)`. peft's own
    `save_pretrained` writes the adapters and what `LoraConfig(modules_to_save=["head", "fc_norm"])` names, so that a
    fresh head must be named there. It names modules only: bare parameters that were trained (`q_bias`, `gamma_1`, bias
    tables) are lost by it, and kept by merging.

    Args:
        model: A `Beit`, alone or inside DistributedDataParallel, `torch.compile` or a moving average.
        directory: Receives `model.safetensors` and `config.json`.

    Raises:
        UserError: The model is not the network that its config describes, or the files cannot be written.
    """
    from beitzoo.weights import folder

    whole = _describe(model)
    config = folder.timm_form.dump(whole.config, whole.pretrained)
    checkpoint.save(whole.state, Path(directory) / folder.WEIGHTS[0])
    write_text(Path(directory) / folder.CONFIG, config)


def save_tokenizer(tokenizer: nn.Module, directory: str | Path) -> None:
    """Save an image tokenizer to a folder that `create_tokenizer` reads.

    Args:
        tokenizer: A `Dvae`, `Vqkd` or `RandomTokenizer`, alone or wrapped as in `save_pretrained`.
        directory: Receives `model.safetensors` and `config.json`.

    Raises:
        UserError: It is no tokenizer, or the files cannot be written.
    """
    from beitzoo.weights import tokenizers

    inner = _unwrapped(tokenizer, "an image tokenizer", Vqkd, Dvae, RandomTokenizer)
    assert isinstance(inner, Vqkd | Dvae | RandomTokenizer)
    checkpoint.save(inner.state_dict(), Path(directory) / tokenizers.WEIGHTS)
    write_text(Path(directory) / tokenizers.CONFIG, tokenizers.dump(inner.config))


def save_transformers(model: nn.Module, directory: str | Path) -> None:
    """Save to a folder that transformers loads.

    It is loaded as `BeitForImageClassification`, without a head as `BeitModel`, a masked image model, which cannot
    have patch aggregation there, as `BeitForMaskedImageModeling`, and a segmentation model as
    `BeitForSemanticSegmentation`: that has no dropout before its classifiers, and reads the last block first or not.

    Args:
        model: As in `save_pretrained`.
        directory: Receives `model.safetensors`, `config.json` and `preprocessor_config.json`.

    Raises:
        UserError: As in `save_pretrained`, or transformers cannot build this network; says why.
    """
    from beitzoo.weights import folder

    whole = _describe(model)
    dtype = checkpoint.widest_dtype(whole.state)
    config, preprocessor = folder.transformers_form.dump(whole.config, whole.pretrained, str(dtype).partition(".")[2])
    has_head = bool(whole.config.num_classes) or isinstance(whole.pretrained.head, Mim | Segment)
    tensors = layouts.to_transformers(whole.state, prefix="beit." if has_head else "")
    checkpoint.save(tensors, Path(directory) / folder.WEIGHTS[0])
    write_text(Path(directory) / folder.CONFIG, config)
    write_text(Path(directory) / folder.PREPROCESSOR, preprocessor)


def save_unilm(model: nn.Module, path: str | Path) -> None:
    """Save to a `.pth` file as the original's scripts load it: with the key `model`, or of segmentation `state_dict`.

    Args:
        model: As in `save_pretrained`.
        path: The file.

    Raises:
        UserError: As in `save_pretrained`.
    """
    whole = _describe(model)
    index = relative_position_index(whole.config.grid_size, torch.device("cpu"))
    state = layouts.to_unilm(whole.state, index)
    document: dict[str, object] = {"model": state}
    if isinstance(whole.pretrained.head, Segment):
        names = label_names(whole.pretrained.head)
        document = {"state_dict": layouts.to_mmsegmentation(state), "meta": {"CLASSES": names} if names else {}}
    checkpoint.save_pickle(document, Path(path))


@dataclass(frozen=True)
class _Whole:
    """What is saved of a model: the tensors are those of the network that the config describes."""

    config: BeitConfig
    pretrained: PretrainedConfig
    state: Mapping[str, Tensor]


def _describe(model: nn.Module) -> _Whole:
    """Check before anything is written that what is saved can be read again.

    Raises:
        InvalidOptionError: There is no BEiT in the model.
        InvalidValueError: The BEiT was changed; says what differs and what to do.
    """
    inner = _unwrapped(model, "a Beit", Beit, MaskedImageModel, Segmenter)
    assert isinstance(inner, Beit | MaskedImageModel | Segmenter)
    beit = inner.backbone
    config, state = beit.config, layouts.strip_backbone(inner.state_dict())
    pretrained = replace(beit.pretrained, head=_head(inner))
    classes = _classes(beit.head, config)
    if classes != config.num_classes:
        _logger.info("The head was replaced by hand; saved with %s classes, not %s.", classes, config.num_classes)
        config = replace(config, num_classes=classes)
        pretrained = replace(pretrained, head=Classify(num_classes=classes))
    with torch.device("meta"):
        expected: nn.Module = Beit(config)
        if not isinstance(inner, Beit):
            expected = type(inner)(Beit(config), inner.config)  # type: ignore[arg-type]
    differences = checkpoint.compare(layouts.strip_backbone(expected.state_dict()), state)
    if differences:
        raise InvalidValueError(
            "This model is not saved, as no library could read it: it differs from the network that its config "
            "describes (- missing, + unexpected, ~ different):\n" + "\n".join(differences) + f"\n{_remedy(state)}"
        )
    return _Whole(config, pretrained, state)


def _head(model: Beit | MaskedImageModel | Segmenter) -> Head:
    """Return the head that the model has now; a backbone may be saved alone."""
    stated = model.backbone.pretrained.head
    match model:
        case MaskedImageModel():
            return Mim(network=model.config, tokenizer=stated.tokenizer if isinstance(stated, Mim) else None)
        case Segmenter():
            return Segment(network=model.config, labels=stated.labels if isinstance(stated, Segment) else None)
    return stated if isinstance(stated, Classify) else Classify(num_classes=0)


def _unwrapped(model: nn.Module, name: str, *kinds: type[nn.Module]) -> nn.Module:
    """Find the network inside DistributedDataParallel, DataParallel, `torch.compile` and moving averages."""
    inner: object = model
    while not isinstance(inner, kinds):
        outer = inner
        inner = getattr(outer, "_orig_mod", None) or getattr(outer, "module", None)
        if not isinstance(inner, nn.Module):
            merge = " Merge its adapters first (merge_and_unload())." if hasattr(outer, "merge_and_unload") else ""
            raise InvalidOptionError(
                f"Got a {type(outer).__name__}; {name} can be saved, alone or inside "
                f"DistributedDataParallel, torch.compile, AveragedModel or ModelEmaV3."
                f"{merge or ' Save the network inside.'}"
            )
    return inner


def _classes(head: nn.Module, config: BeitConfig) -> int:
    """Count the classes of the head that the model has now: tutorials replace it by hand."""
    if type(head) is nn.Linear and head.in_features == config.embed_dim:
        return head.out_features
    return 0 if type(head) is nn.Identity else config.num_classes


def _remedy(state: Mapping[str, Tensor]) -> str:
    """Say what to do about tensors that a plain network does not have."""
    names = " ".join(state)
    if not {"norm.weight", "fc_norm.weight"} & state.keys():
        return "It has lost its norm (features_only, prune_intermediate_layers); save the model it was made from."
    remedies = {
        "parametrizations.": "Call torch.nn.utils.parametrize.remove_parametrizations on its modules first.",
        "_orig ": "It is pruned: call torch.nn.utils.prune.remove on its modules first.",
        "base_layer.": "It has adapters: merge them into the linears first (peft: merge_and_unload()).",
        "lora_": "It has adapters: merge them into the linears first (peft: merge_and_unload()).",
        "_packed_params": "It is quantised; save the model it was made from.",
        "head.": "Give the model its head by reset_classifier(num_classes), or save its state_dict().",
    }
    unexpected = (remedy for sign, remedy in remedies.items() if sign in f"{names} " and sign != "head.")
    return next(unexpected, remedies["head."])
