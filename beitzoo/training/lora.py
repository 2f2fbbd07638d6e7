"""Low-rank adapters (LoRA) by peft, put into the blocks of a network in place, and merged into its weights for saving.

With adapters a `Beit` stays a `Beit`: only linears of its blocks are replaced. What a run saves to go on from has the
adapters apart; the models it leaves (`best/`, `last/`) have none, and are complete checkpoints. peft's own files hold
adapters and modules that are named: bare parameters (`q_bias`, `gamma_1`, bias tables) are in none, trained or not.
"""

import copy

from beitzoo.errors import UnsupportedError
from beitzoo.models.beit import Beit
from beitzoo.training.recipe import RecipeError
from beitzoo.training.sections import Lora

_HEAD = ("norm", "fc_norm", "head")  # one of the norms is an identity
_BLOCKS = ("blocks", "rel_pos_bias")
_PLACES = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}


def add_adapters(model: Beit, section: Lora, frozen: int = 0) -> None:
    """Put adapters into the blocks of a network in place, and freeze all but these, the last norm and the head.

    A is drawn from the global generator as peft and the paper's code do, B is zero: outputs are those of before.

    Args:
        model: Without adapters. What is frozen already stays so.
        section: Of which rank, and where.
        frozen: Blocks, from the first on, that get none.

    Raises:
        UnsupportedError: peft is not installed.
        RecipeError: All blocks are frozen, or the rank is more than the linears have.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # late: it imports transformers
    except ModuleNotFoundError as error:
        raise UnsupportedError("task.lora needs peft; install it with: pip install 'beitzoo[lora]'") from error
    depth, width = model.config.depth, model.config.embed_dim
    if frozen >= depth:
        raise RecipeError(
            f"task.freeze_blocks freezes all {depth} blocks, so that task.lora has none to adapt; give fewer, or leave "
            "out one of the two."
        )
    if section.rank > width:
        raise RecipeError(
            f"task.lora.rank is {section.rank}, but the matrices have {width}; give far less, such as 16."
        )
    learning = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _learns(name, parameter.ndim, section)
    ]
    names = "|".join(rf"{_PLACES[target]}\.{target}" for target in section.targets)
    places = rf"blocks\.({'|'.join(map(str, range(frozen, depth)))})\.({names})"
    config = LoraConfig(r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=places)
    inject_adapter_in_model(config, model)  # freezes all else
    for parameter in learning:
        parameter.requires_grad_(True)


def _learns(name: str, ndim: int, section: Lora) -> bool:
    """Say whether a parameter of the plain network is trained beside the adapters."""
    part = name.partition(".")[0]
    is_matrix = ndim > 1 and name.endswith(".weight")  # a bias table is not
    return part in _HEAD or (section.besides == "all" and part in _BLOCKS and not is_matrix)


def merged(model: Beit) -> Beit:
    """Return a copy without adapters whose matrices are W + (alpha / rank) B A; the model itself stays as it is.

    Outputs are the same to rounding: by 1e-10 of the largest in float64, 1e-5 in float32. A moving average of the
    weights is one of A and of B, and it is their averages that are multiplied.
    """
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    del plain.peft_config  # peft's note of the adapters
    return plain


def describe_adapters(model: Beit, section: Lora, layer_decay: float) -> list[str]:
    """Say what is adapted, and whether it learns as slowly as a whole network would."""
    from peft.tuners.lora import LoraLayer

    depth = model.config.depth
    adapted = sum(any(isinstance(part, LoraLayer) for part in block.modules()) for block in model.blocks)
    lines = [
        f"LoRA of rank {section.rank}, scaled by {section.alpha / section.rank:g}, on {', '.join(section.targets)} of "
        f"{adapted} of {depth} blocks; it is merged into the weights that are saved."
    ]
    if layer_decay < 1:
        lines.append(
            f"train.layer_decay: adapters of the first block learn at {layer_decay**depth:.2g} of train.lr, as in "
            "recipes for whole networks; the recipe lora has one rate for all blocks, 1.25e-3, and says why."
        )
    return lines
