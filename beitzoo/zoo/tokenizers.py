"""The image tokenizers of the zoo, by name: one table, and questions about it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from beitzoo.errors import InvalidOptionError, closest
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.checkpoints import ReleaseFile, Source, WebFile
from beitzoo.zoo.networks import BeitConfig, DvaeConfig, RandomConfig, VqkdConfig, plain
from beitzoo.zoo.registry import Patterns, UnknownModelError, matches, split_name

TokenizerConfig = DvaeConfig | VqkdConfig | RandomConfig

# unilm's networks for tokenizers: absolute positions, no tables, no layer scale (beit2/modeling_vqkd.py).
_ENCODER = BeitConfig(num_classes=0, use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.0)
_DECODER = replace(_ENCODER, img_size=(14, 14), patch_size=(1, 1), in_chans=32)
_NANO = replace(_ENCODER, img_size=(32, 32), patch_size=(4, 4), embed_dim=96, depth=3, num_heads=3)
_TEST = replace(_ENCODER, img_size=(64, 64), embed_dim=32, depth=1, num_heads=2)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """One of the files that together are the weights of a tokenizer.

    Attributes:
        sources: Places that have it, tried in this order. All hold the same tensors.
        part: The part of the tokenizer that it is a pickle of, as OpenAI has a file for each half; the file of a whole
            tokenizer has None, and is a state dict.
    """

    sources: tuple[Source, ...]
    part: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """What is known of one tokenizer.

    Attributes:
        config: The network.
        files: Its weights; empty where there are none.
        license: Of the weights, as their authors state it.
        paper: Where it is described.
        name: How it is called; None in the table, whose keys say it.
    """

    config: TokenizerConfig
    files: tuple[TokenizerFile, ...] = ()
    license: str | None = None
    paper: str | None = None
    name: str | None = None


TOKENIZERS: dict[str, TokenizerEntry] = {
    "dvae_patch8_112.dalle": TokenizerEntry(
        config=DvaeConfig(),
        files=(
            TokenizerFile(sources=(WebFile("https://cdn.openai.com/dall-e/encoder.pkl"),), part="encoder"),
            TokenizerFile(sources=(WebFile("https://cdn.openai.com/dall-e/decoder.pkl"),), part="decoder"),
        ),
        license="Modified MIT",  # OpenAI's: use responsibly, and say that it was used
        paper="https://arxiv.org/abs/2102.12092",
    ),
    "vqkd_encoder_base_decoder_3x768x12.clip": TokenizerEntry(
        config=VqkdConfig(encoder=_ENCODER, decoder=replace(_DECODER, depth=3)),
        files=(
            TokenizerFile(
                sources=(
                    ReleaseFile(
                        "BEiT-v2",
                        "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth",
                        sha256_prefix="d5036aa7",
                    ),
                ),
            ),
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "vqkd_encoder_base_decoder_1x768x12.clip": TokenizerEntry(
        config=VqkdConfig(encoder=_ENCODER, decoder=replace(_DECODER, depth=1)),
        files=(
            TokenizerFile(
                sources=(
                    ReleaseFile(
                        "BEiT-v2",
                        "vqkd_encoder_base_decoder_1x768x12_clip-d93179da.pth",
                        sha256_prefix="d93179da",
                    ),
                ),
            ),
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "vqkd_encoder_base_decoder_1x768x12.dino": TokenizerEntry(
        config=VqkdConfig(encoder=_ENCODER, decoder=replace(_DECODER, depth=1), teacher_dim=768),
        files=(
            TokenizerFile(
                sources=(
                    ReleaseFile(
                        "BEiT-v2",
                        "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7.pth",
                        sha256_prefix="663c55d7",
                    ),
                ),
            ),
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    # Small enough to train on a laptop; its grid is that of beit_nano_patch4_32.
    "vqkd_nano_patch4_32": TokenizerEntry(
        config=VqkdConfig(
            encoder=_NANO,
            decoder=replace(_NANO, depth=1, img_size=(8, 8), patch_size=(1, 1), in_chans=16),
            vocab_size=512,
            code_dim=16,
        ),
        paper="https://arxiv.org/abs/2208.06366",
    ),
    # The control without learning for vqkd_nano_patch4_32.
    "random_patch4_32": TokenizerEntry(
        config=RandomConfig(img_size=(32, 32), patch_size=(4, 4), vocab_size=512),
        paper="https://arxiv.org/abs/2202.01855",
    ),
    # For tests: the grid of test_beit.
    "test_dvae": TokenizerEntry(
        config=DvaeConfig(img_size=(32, 32), vocab_size=64, hidden_dim=8, decoder_dim=8, blocks_per_group=1)
    ),
    "test_vqkd": TokenizerEntry(
        config=VqkdConfig(
            encoder=_TEST,
            decoder=replace(_TEST, img_size=(4, 4), patch_size=(1, 1), in_chans=8),
            vocab_size=64,
            code_dim=8,
            teacher_dim=16,
        )
    ),
}

# Overrides of a VQ-KD that are fields of both its networks or of another record than its own.
_SHARED = ("img_size", "in_chans")


def find_tokenizer(name: str) -> TokenizerEntry:
    """Look up a tokenizer by its name; one without its tag stands for its first checkpoint.

    Raises:
        UnknownModelError: The name is not in the table; the closest are named.
    """
    full = _full_name(name)
    if full is not None:
        return replace(TOKENIZERS[full], name=full)
    if split_name(name)[0] in ARCHITECTURES:
        raise UnknownModelError(f"{name!r} is a model, not an image tokenizer; make it with create_model({name!r}).")
    raise UnknownModelError(
        f"There is no tokenizer {name!r}; {closest(name, TOKENIZERS)} `beitzoo list --tokenizers` shows all; a folder "
        "that save_tokenizer or a run of `beitzoo train-tokenizer` made is a name too."
    )


def is_tokenizer(name: str) -> bool:
    """Tell whether this is the name of a tokenizer of the table."""
    return _full_name(name) is not None


def list_tokenizers(filter: Patterns = "") -> list[str]:
    """List the tokenizers, those with weights first.

    Args:
        filter: Glob, or several, of which one must match.
    """
    return [name for name in TOKENIZERS if matches(name, filter)]


def _full_name(name: str) -> str | None:
    return next((known for known in TOKENIZERS if name in (known, split_name(known)[0])), None)


def override_tokenizer(config: TokenizerConfig, overrides: Mapping[str, Any]) -> TokenizerConfig:
    """Return the config with fields replaced; encoder and decoder stay consistent.

    A single int stands for both sides of a size, and None leaves a field as it is.

    Raises:
        InvalidOptionError: A name is no field of this tokenizer; the closest are named.
        InvalidValueError: A value is out of range.
    """
    known = [field.name for field in fields(config) if field.name not in ("encoder", "decoder")]
    known += [name for name in _SHARED if name not in known]
    given = {name: plain(value) for name, value in overrides.items() if value is not None}
    for name in given.keys() - set(known):
        raise InvalidOptionError(f"{name!r} is not an option of this tokenizer; {closest(name, known)}")
    for name in given.keys() & {"img_size", "patch_size"}:
        side = given[name]
        given[name] = (side, side) if isinstance(side, int) else side
    if not isinstance(config, VqkdConfig):
        return replace(config, **given)
    shared = {name: given.pop(name) for name in _SHARED if name in given}
    encoder = replace(config.encoder, **shared)
    codes = given.get("code_dim", config.code_dim)
    decoder = replace(config.decoder, img_size=encoder.grid_size, in_chans=codes)
    return replace(config, encoder=encoder, decoder=decoder, **given)
