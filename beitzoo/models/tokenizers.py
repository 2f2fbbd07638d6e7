"""Image tokenizers: networks that turn an image into a grid of visual tokens, the targets of pretraining.

`Dvae` is the discrete variational autoencoder of DALL-E (https://arxiv.org/abs/2102.12092), whose codes BEiT predicts;
`Vqkd` is BEiT v2's vector-quantised knowledge distillation (https://arxiv.org/abs/2208.06366, section 2.2). Parameter
names are OpenAI's and unilm's; they are a public contract.

Shapes: B batch, h w token grid, V codes of the codebook, D channels of a code.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.models.beit import Beit
from beitzoo.models.quantizer import Quantizer
from beitzoo.zoo.networks import BeitConfig, DvaeConfig, Pair, Target, VqkdConfig

# Pixels are squeezed into [EPSILON, 1 - EPSILON]: the logit-Laplace distribution has no mass at 0 and 1.
EPSILON = 0.1

Kernels = tuple[int, int, int, int]


class DvaeConv2d(nn.Module):
    """A convolution that keeps the size, with OpenAI's parameter names."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int) -> None:
        super().__init__()
        std = (in_chans * kernel**2) ** -0.5
        self.w = nn.Parameter(torch.empty(out_chans, in_chans, kernel, kernel).normal_(std=std))
        self.b = nn.Parameter(torch.zeros(out_chans))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, height, width) to (B, out_chans, height, width)."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DvaeBlock(nn.Module):
    """A residual block of four convolutions; kernel sizes are those of the encoder or of the decoder."""

    def __init__(self, in_chans: int, out_chans: int, kernels: Kernels, gain: float) -> None:
        super().__init__()
        hidden = out_chans // 4
        widths = (in_chans, hidden, hidden, hidden, out_chans)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, kernel in enumerate(kernels, start=1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = DvaeConv2d(widths[number - 1], widths[number], kernel)
        self.id_path = nn.Identity() if in_chans == out_chans else DvaeConv2d(in_chans, out_chans, 1)
        self.res_path = nn.Sequential(layers)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, height, width) to (B, out_chans, height, width)."""
        return self.id_path(x) + self.gain * self.res_path(x)


class DvaeEncoder(nn.Module):
    """From pixels to the logits of codes, at an eighth of the size."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim * factor for factor in (1, 1, 2, 4, 8)]
        layers = [
            ("input", DvaeConv2d(config.in_chans, widths[0], 7)),
            *_groups(widths, (3, 3, 3, 1), config, "pool", lambda: nn.MaxPool2d(2)),
            ("output", _relu_conv(widths[-1], config.vocab_size)),
        ]
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map squeezed pixels (B, in_chans, 8 h, 8 w) to logits (B, V, h, w).

        The last convolution computes in float32 under any autocast, as in the original: of logits that are rounded to
        bfloat16 several are the largest.
        """
        hidden = self.blocks[:-1](pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            logits: Tensor = self.blocks[-1](hidden.to(next(self.parameters()).dtype))
        return logits


class DvaeDecoder(nn.Module):
    """From codes to the parameters of a logit-Laplace distribution of pixels, at eight times the size."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        widths = [config.decoder_dim, *(config.hidden_dim * factor for factor in (8, 4, 2, 1))]
        layers = [
            ("input", DvaeConv2d(config.vocab_size, widths[0], 1)),
            *_groups(widths, (1, 3, 3, 3), config, "upsample", lambda: nn.Upsample(scale_factor=2)),
            ("output", _relu_conv(widths[-1], 2 * config.in_chans)),
        ]
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, codes: Tensor) -> Tensor:
        """Map one-hot codes (B, V, h, w) to means and log-scales (B, 2 in_chans, 8 h, 8 w)."""
        parameters: Tensor = self.blocks(codes)
        return parameters


class Dvae(nn.Module):
    """DALL-E's tokenizer: a code is the likeliest of the encoder's logits; codes decode to pixels.

    Attributes:
        config: What was built.
        interpolation: Filter by which images are brought to its size, as in BEiT's pretraining.
        decodes_to: What `decode` returns.
    """

    interpolation: Final = "lanczos"
    decodes_to: Final = "pixels"

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DvaeEncoder(config)
        self.decoder = DvaeDecoder(config)

    @property
    def img_size(self) -> Pair:
        """Height and width of its images in pixels."""
        return self.config.img_size

    @property
    def in_chans(self) -> int:
        """Colour channels of its images."""
        return self.config.in_chans

    @property
    def grid_size(self) -> Pair:
        """Rows and columns of codes."""
        return self.config.img_size[0] // 8, self.config.img_size[1] // 8

    @property
    def vocab_size(self) -> int:
        """Codes to tell apart."""
        return self.config.vocab_size

    def set_input_size(self, img_size: Pair) -> None:
        """Take images of another size; a convolution knows no positions.

        Raises:
            InvalidValueError: It is not a multiple of 8.
        """
        self.config = replace(self.config, img_size=img_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) with values in [0, 1] to codes (B, h, w), int64.

        Raises:
            InvalidValueError: The images are of another size, channel count or type than the tokenizer's.
        """
        check_images(images, self.config.in_chans, self.config.img_size)
        logits: Tensor = self.encoder((1 - 2 * EPSILON) * images + EPSILON)
        return logits.argmax(dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to images (B, in_chans, 8 h, 8 w) with values in [0, 1]: the mean of the distribution."""
        dtype = next(self.decoder.parameters()).dtype
        one_hot = F.one_hot(codes, self.config.vocab_size).permute(0, 3, 1, 2).to(dtype)  # (B, V, h, w)
        means: Tensor = self.decoder(one_hot)[:, : self.config.in_chans]
        return ((means.sigmoid() - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


class Tokenized(NamedTuple):
    """What a VQ-KD tokenizer makes of a batch while it is trained.

    Attributes:
        prediction: Of the targets of all patches, (B, h w, prediction_dim).
        commitment: Mean squared distance from features to their codes, a scalar.
        codes: The codes, (B, h w), int64.
        features: What was rounded to them, unit vectors (B, h w, D).
    """

    prediction: Tensor
    commitment: Tensor
    codes: Tensor
    features: Tensor


class Vqkd(nn.Module):
    """BEiT v2's tokenizer: a BEiT whose patch tokens are rounded to codes; codes decode to features of a teacher.

    With `target="pixels"` codes decode to the pixels of their patches: an autoencoder, which needs no teacher.

    Attributes:
        config: What was built.
        interpolation: Filter by which images are brought to its size, as in BEiT v2's pretraining.
    """

    interpolation: Final = "bicubic"

    def __init__(self, config: VqkdConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Beit(config.encoder)
        self.decoder = Beit(config.decoder)
        self.quantize = Quantizer(config.vocab_size, config.code_dim)
        self.encode_task_layer = _task_layer(config.encoder.embed_dim, config.code_dim)
        self.decode_task_layer = _task_layer(config.decoder.embed_dim, config.prediction_dim)

    @property
    def img_size(self) -> Pair:
        """Height and width of its images in pixels."""
        return self.config.encoder.img_size

    @property
    def in_chans(self) -> int:
        """Colour channels of its images."""
        return self.config.encoder.in_chans

    @property
    def grid_size(self) -> Pair:
        """Rows and columns of codes."""
        return self.config.encoder.grid_size

    @property
    def vocab_size(self) -> int:
        """Codes to tell apart."""
        return self.config.vocab_size

    @property
    def decodes_to(self) -> Target:
        """What `decode` returns."""
        return self.config.target

    def set_input_size(self, img_size: Pair) -> None:
        """Take images of another size: positions of encoder and decoder are fitted to it, see `Beit.set_input_size`.

        Raises:
            InvalidValueError: It is no whole number of patches.
        """
        if img_size == self.img_size:
            return
        self.encoder.set_input_size(img_size)
        self.decoder.set_input_size(self.encoder.config.grid_size)
        self.config = replace(self.config, encoder=self.encoder.config, decoder=self.decoder.config)

    def forward(self, images: Tensor) -> Tokenized:
        """Encode and decode images (B, in_chans, *img_size) with values in [0, 1], as needed for training.

        The decoder takes the codes; gradients pass through the rounding as if it were not there. Codes get none:
        they learn by `quantize.learn`.

        Raises:
            InvalidValueError: The images are of another size, channel count or type than the tokenizer's.
        """
        features = self.features(images)
        codes = self.quantize(features)
        features = F.normalize(features, dim=-1)
        rounded = F.embedding(codes, self.quantize.embedding.weight)
        commitment = F.mse_loss(features, rounded)
        passed = features + (rounded - features).detach()
        return Tokenized(self._predict(passed.unflatten(1, self.config.encoder.grid_size)), commitment, codes, features)

    @property
    def codebook(self) -> Tensor:
        """All codes, unit vectors to rounding, (V, D)."""
        return self.quantize.embedding.weight

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) with values in [0, 1] to what is rounded to codes, (B, h w, D).

        What follows the encoder computes in float32 under any autocast, as in the original: a rounded feature may be
        nearer to another code.

        Raises:
            InvalidValueError: The images are of another size, channel count or type than the tokenizer's.
        """
        encoder = self.config.encoder
        check_images(images, encoder.in_chans, encoder.img_size)
        tokens = _patch_tokens(self.encoder, 2 * images - 1)
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.encode_task_layer(tokens.to(self.quantize.embedding.weight.dtype))
        return features

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) with values in [0, 1] to codes (B, h, w), int64.

        Raises:
            InvalidValueError: The images are of another size, channel count or type than the tokenizer's.
        """
        codes: Tensor = self.quantize(self.features(images))
        return codes.unflatten(1, self.config.encoder.grid_size)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to features of the teacher's patches, (B, h w, teacher_dim).

        With `target="pixels"` map them to images (B, in_chans, *img_size) with values in [0, 1].
        """
        prediction = self._predict(F.embedding(codes, self.quantize.embedding.weight))
        if self.config.target == "features":
            return prediction
        encoder = self.config.encoder
        return ((_join_patches(prediction, encoder) + 1) / 2).clamp(0, 1)

    def pixel_targets(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) with values in [0, 1] to what decodes to them, (B, h w, prediction_dim).

        That is the pixels of each patch, in [-1, 1] as the encoder takes them.
        """
        return _cut_patches(2 * images - 1, self.config.encoder)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that describe positions and class tokens; they are not decayed."""
        networks = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{name}.{key}" for name, network in networks.items() for key in network.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of both networks in the backward pass, or do not."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)

    def _predict(self, vectors: Tensor) -> Tensor:
        """Map codes as vectors (B, h, w, D) to the targets of all patches, (B, h w, prediction_dim)."""
        prediction: Tensor = self.decode_task_layer(_patch_tokens(self.decoder, vectors.permute(0, 3, 1, 2)))
        return prediction


def _cut_patches(images: Tensor, network: BeitConfig) -> Tensor:
    """Cut images (B, C, H, W) into the patches of a network, (B, h w, C * patch area)."""
    height, width = network.patch_size
    cut = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, h, height, w, width)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _join_patches(patches: Tensor, network: BeitConfig) -> Tensor:
    """Join patches as `_cut_patches` cuts them to images (B, C, H, W)."""
    joined = patches.unflatten(2, (network.in_chans, *network.patch_size)).unflatten(1, network.grid_size)
    return joined.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _patch_tokens(network: Beit, images: Tensor) -> Tensor:
    """Return the normed patch tokens of a backbone, (B, h w, C)."""
    found = network.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    tokens: Tensor = found[0]
    return tokens


def _task_layer(width: int, outputs: int) -> nn.Sequential:
    linears = nn.Linear(width, width), nn.Linear(width, outputs)
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linears[0], nn.Tanh(), linears[1])


def _relu_conv(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=DvaeConv2d(in_chans, out_chans, 1)))


def _groups(
    widths: list[int], kernels: Kernels, config: DvaeConfig, resize_name: str, resize: Callable[[], nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the groups of residual blocks by name; all but the last end with a change of size."""
    count = len(widths) - 1
    gain = 1 / (count * config.blocks_per_group) ** 2
    for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, config.blocks_per_group + 1):
            layers[f"block_{block}"] = DvaeBlock(before if block == 1 else after, after, kernels, gain)
        if number < count:
            layers[resize_name] = resize()
        yield f"group_{number}", nn.Sequential(layers)


def check_images(images: Tensor, in_chans: int, img_size: Pair) -> None:
    """Refuse images that would give another grid of codes than the tokenizer's.

    Raises:
        InvalidValueError: They are of another size, channel count or type.
    """
    expected = ("batch", in_chans, *img_size)
    check(
        images.ndim == 4 and tuple(images.shape[1:]) == expected[1:],
        f"Got images of shape {tuple(images.shape)}; this tokenizer takes {expected}: one code for each patch of the "
        "model that is trained. Resize the images.",
    )
    check(images.is_floating_point(), f"Got images of {images.dtype}; this tokenizer takes numbers in [0, 1].")
