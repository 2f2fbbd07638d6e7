"""Segmentation models: logits, loss and gradients of transformers', and of the original's by a slow plain reference."""

from dataclasses import replace

import pytest
import torch
import transformers
from oracles import randomise, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import beitzoo
from beitzoo.models.beit import Beit
from beitzoo.models.segmentation import Segmenter
from beitzoo.zoo.networks import BeitConfig, SegmenterConfig

NETWORK = BeitConfig(img_size=(48, 80), embed_dim=24, depth=6, num_heads=3, num_classes=0)
HEADS = SegmenterConfig(num_classes=7, out_indices=(1, 2, 3, 5), auxiliary_channels=10)
TWO_CONVS = replace(HEADS, auxiliary_convs=2, pool_scales=(1, 4), out_indices=(3, 3, 0, -1))
LINEAR = SegmenterConfig(num_classes=7, decoder="linear")


def build(network: BeitConfig = NETWORK, heads: SegmenterConfig = HEADS) -> Segmenter:
    model = Segmenter(Beit(network), heads).eval()
    return randomise_all(model)


def randomise_all(model: Segmenter) -> Segmenter:
    """Fill the statistics of batch norms too."""
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(5)
    return model


# ---- the reference: mmsegmentation's steps in double precision, resizing and pooling by loops ------------------


def reference(model: Segmenter, images: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """Return the logits of the decode head, and of the auxiliary head if there is one."""
    config = model.config
    backbone = Beit(model.backbone.config).double()
    own = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    blocks = config.out_indices
    maps = []
    for block in blocks:
        tokens = reference_tokens(backbone, own, images, block + 1)
        h, w = images.shape[2] // 16, images.shape[3] // 16
        maps.append(tokens[:, 1:].permute(0, 2, 1).reshape(len(images), -1, h, w))
    if config.decoder == "linear":
        x = reference_norm(maps[0], state, "decode_head.bn")
        return [F.conv2d(x, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"])]

    def up(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"neck.{name}.weight"], state[f"neck.{name}.bias"]
        b, _, h, w = x.shape
        parts = torch.einsum("bchw,cdyx->bdhywx", x, weight)
        return parts.reshape(b, -1, 2 * h, 2 * w) + bias[:, None, None]

    first = up(F.gelu(reference_norm(up(maps[0], "fpn1.0"), state, "neck.fpn1.1")), "fpn1.3")
    h, w = maps[3].shape[2] // 2, maps[3].shape[3] // 2
    last = maps[3][:, :, : 2 * h, : 2 * w].unflatten(3, (w, 2)).unflatten(2, (h, 2)).amax((3, 5))
    pyramid = [first, up(maps[1], "fpn2.0"), maps[2], last]

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return reference_norm(x, state, f"{name}.bn").clamp_min(0)

    def classify(x: Tensor, head: str) -> Tensor:
        return F.conv2d(x, state[f"{head}.conv_seg.weight"], state[f"{head}.conv_seg.bias"])

    pooled = [
        resize(conv(pool(last, side), f"decode_head.psp_modules.{index}.1"), h, w)
        for index, side in enumerate(config.pool_scales)
    ]
    laterals = [conv(pyramid[level], f"decode_head.lateral_convs.{level}") for level in range(3)]
    laterals.append(conv(torch.cat([last, *pooled], 1), "decode_head.bottleneck"))
    for level in (3, 2, 1):
        laterals[level - 1] = laterals[level - 1] + resize(laterals[level], *laterals[level - 1].shape[2:])
    outs = [conv(laterals[level], f"decode_head.fpn_convs.{level}") for level in range(3)] + [laterals[3]]
    outs = [resize(out, *outs[0].shape[2:]) for out in outs]
    logits = [classify(conv(torch.cat(outs, 1), "decode_head.fpn_bottleneck"), "decode_head")]
    if config.has_auxiliary:
        x = pyramid[2]
        for index in range(config.auxiliary_convs):
            x = conv(x, f"auxiliary_head.convs.{index}")
        logits.append(classify(x, "auxiliary_head"))
    return logits


def reference_tokens(backbone: Beit, state: dict[str, Tensor], images: Tensor, count: int) -> Tensor:
    """Return the tokens behind this many blocks; the backbone itself is held to its own references elsewhere."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beit = backbone

        def forward(self, images: Tensor) -> Tensor:
            x, bias = self.beit.embed(images)
            for block in list(self.beit.blocks)[:count]:
                x = block(x, bias)
            return x

    prefixed = {f"beit.{name}": tensor for name, tensor in state.items()}
    return torch.func.functional_call(Blocks(), prefixed, (images,))


def reference_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def pool(x: Tensor, side: int) -> Tensor:
    h, w = x.shape[2:]
    rows = [(i * h // side, -(-(i + 1) * h // side)) for i in range(side)]
    columns = [(i * w // side, -(-(i + 1) * w // side)) for i in range(side)]
    return torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], -1) for a, b in rows], -2)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly; the centres of the corner pixels are not aligned."""
    for axis, target in ((2, height), (3, width)):
        source = x.shape[axis]
        weights = x.new_zeros(target, source)
        for place in range(target):
            at = max((place + 0.5) * source / target - 0.5, 0.0)
            low = min(int(at), source - 1)
            high = min(low + 1, source - 1)
            weights[place, low] += 1 - (at - low)
            weights[place, high] += at - low
        x = torch.movedim(torch.tensordot(x, weights, dims=([axis], [1])), -1, axis)
    return x


@pytest.mark.parametrize(
    ("heads", "size"),
    [(HEADS, (48, 80)), (TWO_CONVS, (80, 112)), (LINEAR, (48, 80)), (replace(HEADS, auxiliary_channels=0), (64, 32))],
    ids=["original", "other fields", "linear", "without auxiliary head"],
)
def test_logits_and_gradients_are_the_references(heads: SegmenterConfig, size: tuple[int, int]) -> None:
    model = build(replace(NETWORK, img_size=size), heads)
    images = torch.randn(3, 3, *size)
    # In training mode with the statistics and without the dropout of evaluation, to have both heads' logits.
    model.training = True
    logits = model(images)
    logits = [logits] if isinstance(logits, Tensor) else list(logits)
    weights = [torch.randn_like(one) for one in logits]
    torch.stack([(one * weight).mean() for one, weight in zip(logits, weights, strict=True)]).sum().backward()
    state = {name: t.detach().double() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    expected = reference(model, images.double(), state)
    assert len(expected) == len(logits)
    torch.stack([(one * weight).mean() for one, weight in zip(expected, weights, strict=True)]).sum().backward()
    h, w = size[0] // 16, size[1] // 16
    assert logits[0].shape == (3, 7, *((h, w) if heads.decoder == "linear" else (4 * h, 4 * w)))
    for ours, theirs in zip(logits, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-4
    last = max(model.config.out_indices)
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.blocks.") and int(name.split(".")[2]) > last:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, state[name].grad) < 1e-4, name
    with torch.no_grad():
        assert relative_error(model.eval()(images), logits[0]) < 1e-5


# ---- transformers -----------------------------------------------------------------------------------------------


def peer(**fields: object) -> transformers.BeitForSemanticSegmentation:
    config = transformers.BeitConfig(
        image_size=64,
        hidden_size=24,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=96,
        auxiliary_channels=10,
        num_labels=7,
        use_relative_position_bias=True,
        drop_path_rate=0.0,
        **{"out_indices": [2, 3, 4, 6], **fields},
    )
    theirs = randomise_all(transformers.BeitForSemanticSegmentation(config).eval())
    for name, parameter in theirs.named_parameters():
        if "lambda" in name:
            nn.init.normal_(parameter, std=0.3)
    return theirs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"out_indices": [0, 1, 2, -1], "auxiliary_num_convs": 2},
        {"use_auxiliary_head": False, "use_mask_token": True},
    ],
    ids=str,
)
def test_logits_loss_and_gradients_are_transformers(fields: dict[str, object], tmp_path) -> None:
    theirs = peer(**fields)
    theirs.save_pretrained(tmp_path)
    # It fits tables bilinearly, and to every size.
    ours = beitzoo.create_model(tmp_path, pretrained=True, dynamic_img_size=True, resize_rule="bilinear").eval()
    assert isinstance(ours, Segmenter)
    blocks = [(index - 1) % 7 - 1 for index in theirs.config.out_indices]
    assert ours.config.out_indices == tuple(blocks)
    images, labels = torch.randn(3, 3, 48, 80), torch.randint(7, (3, 48, 80))
    labels[:, 5:9] = 255
    expected = theirs(images, labels=labels)
    expected.loss.backward()
    ours.training = True
    logits = ours(images)
    several = [logits] if isinstance(logits, Tensor) else list(logits)
    assert len(several) == 1 + theirs.config.use_auxiliary_head
    losses = [
        F.cross_entropy(F.interpolate(one, (48, 80), mode="bilinear"), labels, ignore_index=255) for one in several
    ]
    loss = losses[0] + 0.4 * sum(losses[1:])
    loss.backward()
    assert relative_error(several[0], expected.logits) < 1e-4
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    theirs_by_name = dict(gradients_by_our_name(theirs))
    for name, parameter in ours.named_parameters():
        gradient = theirs_by_name.get(name)
        if parameter.grad is None:
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None and relative_error(parameter.grad, gradient) < 1e-4, name


def gradients_by_our_name(theirs: nn.Module):
    """Give the gradients the names of files by the library's own map, and then ours."""
    from beitzoo.weights import layouts

    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    anchor = layouts.choose_network({"beit.embeddings.cls_token": 0}).anchor
    network = layouts.Network("", {"beit.embeddings.cls_token": torch.zeros(1), **found}, anchor)
    return layouts.add_segmenter(layouts.to_ours(network)).items()
