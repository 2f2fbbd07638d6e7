"""Tokenizers give the codes, pixels and features of independent references, under the originals' parameter names."""

import pytest
import timm
import torch
from oracles import randomise, relative_error
from torch import Tensor
from torch.nn import functional as F

from beitzoo.models.tokenizers import Dvae, Vqkd
from beitzoo.zoo.networks import BeitConfig, DvaeConfig, VqkdConfig

DVAE = DvaeConfig(img_size=(48, 32), vocab_size=64, hidden_dim=8, decoder_dim=12)
SMALL = {"embed_dim": 48, "num_heads": 3, "num_classes": 0, "use_abs_pos_emb": True, "use_rel_pos_bias": False}
VQKD = VqkdConfig(
    encoder=BeitConfig(**SMALL, init_values=0.0, depth=2, img_size=(64, 64)),
    decoder=BeitConfig(**SMALL, init_values=0.0, depth=1, img_size=(4, 4), patch_size=(1, 1), in_chans=8),
    vocab_size=50,
    code_dim=8,
    teacher_dim=20,
)


def dvae_reference(weights: dict[str, Tensor], x: Tensor, blocks: int, between: str) -> Tensor:
    """Run either half by its parameter names alone: convolutions, rectifiers and a change of size, in a plain loop."""

    def conv(name: str, x: Tensor) -> Tensor:
        kernel = weights[f"{name}.w"]
        return F.conv2d(x, kernel, weights[f"{name}.b"], padding=(kernel.shape[2] - 1) // 2)

    x = conv("blocks.input", x)
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            y = x
            for number in range(1, 5):
                y = conv(f"{name}.res_path.conv_{number}", y.relu())
            shortcut = conv(f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x
            x = shortcut + y / (4 * blocks) ** 2
        if group < 4 and between == "pool":
            x = F.max_pool2d(x, 2)
        elif group < 4:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return conv("blocks.output.conv", x.relu())


def double(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in module.state_dict().items()}


def test_dvae_is_the_reference() -> None:
    model = Dvae(DVAE).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    images = torch.rand(3, 3, 48, 32)
    squeezed = 0.8 * images.double() + 0.1
    with torch.no_grad():  # or one code would be the likeliest everywhere
        model.encoder.blocks.output.conv.b -= model.encoder(squeezed.float()).mean((0, 2, 3))
    logits = dvae_reference(double(model.encoder), squeezed, 2, "pool")
    assert relative_error(model.encoder(squeezed.float()), logits) < 1e-5
    codes = model.encode(images)
    assert torch.equal(codes, logits.argmax(1))
    assert len(codes.unique()) > 5
    one_hot = F.one_hot(codes, 64).permute(0, 3, 1, 2).double()
    means = dvae_reference(double(model.decoder), one_hot, 2, "upsample")[:, :3].sigmoid()
    pixels = ((means - 0.1) / 0.8).clamp(0, 1)
    decoded = model.decode(codes)
    assert decoded.shape == images.shape
    assert relative_error(decoded, pixels) < 1e-5


def test_logits_of_dvae_are_not_rounded_under_autocast() -> None:
    """Of logits in bfloat16 several would be the largest, and the first of them the code."""
    model = Dvae(DvaeConfig(img_size=(32, 32), hidden_dim=8, vocab_size=4096)).eval()
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.encoder(images)
    assert logits.dtype == torch.float32
    best = logits.topk(2, dim=1).values
    assert (best[:, 0] > best[:, 1]).all()
    assert (logits.argmax(dim=1) == model.encoder(images).argmax(dim=1)).float().mean() > 0.9


def test_sizes_are_those_of_the_released_files() -> None:
    """OpenAI's two files and unilm's three, without the teacher; counted from the published architectures."""
    plain = {"num_classes": 0, "use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0.0}
    with torch.device("meta"):
        dvae = Dvae(DvaeConfig())
        assert sum(p.numel() for p in dvae.encoder.parameters()) == 53_786_240
        assert sum(p.numel() for p in dvae.decoder.parameters()) == 43_829_766
        for depth, teacher_dim, millions in ((1, 512, 94.66), (3, 512, 108.83), (1, 768, 94.85)):
            decoder = BeitConfig(**plain, depth=depth, img_size=(14, 14), patch_size=(1, 1), in_chans=32)
            model = Vqkd(VqkdConfig(encoder=BeitConfig(**plain), decoder=decoder, teacher_dim=teacher_dim))
            learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert round(learned / 1e6, 2) == millions
            assert model.quantize.embedding.weight.numel() == 8192 * 32


def timms(network: torch.nn.Module, config: BeitConfig) -> torch.nn.Module:
    theirs = timm.models.beit.Beit(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=0,
        use_abs_pos_emb=True,
        init_values=None,
    )
    theirs.load_state_dict(network.state_dict(), strict=True)
    return theirs.eval().double()


def task(layer: torch.nn.Module, x: Tensor) -> Tensor:
    weights = double(layer)
    hidden = torch.tanh(x @ weights["0.weight"].t() + weights["0.bias"])
    return hidden @ weights["2.weight"].t() + weights["2.bias"]


def test_vqkd_is_timms_network_and_the_nearest_codes() -> None:
    model = Vqkd(VQKD).eval()
    for part in (model.encoder, model.decoder, model.encode_task_layer, model.decode_task_layer):
        randomise(part)
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        encoder = timms(model.encoder, VQKD.encoder)
        tokens = encoder.fc_norm(encoder.forward_features(2 * images.double() - 1))[:, 1:]
        features = F.normalize(task(model.encode_task_layer, tokens), dim=-1)
        distances = torch.cdist(features, model.quantize.embedding.weight.double().expand(3, -1, -1))
        codes = model.encode(images)
        assert torch.equal(codes.flatten(1), distances.argmin(-1))
        assert codes.shape == (3, 4, 4)
        assert len(codes.unique()) > 5
        decoder = timms(model.decoder, VQKD.decoder)
        vectors = model.quantize.embedding.weight[codes].permute(0, 3, 1, 2).double()
        expected = task(model.decode_task_layer, decoder.fc_norm(decoder.forward_features(vectors))[:, 1:])
        decoded = model.decode(codes)
    assert decoded.shape == (3, 16, 20)
    assert relative_error(decoded, expected) < 1e-5


@pytest.mark.parametrize("model", [Dvae(DVAE), Vqkd(VQKD)], ids=["dvae", "vqkd"])
def test_codes_are_the_same_in_every_run_and_batch(model: Dvae | Vqkd) -> None:
    model.eval()
    images = torch.rand(4, 3, *(model.config.img_size if isinstance(model, Dvae) else (64, 64)))
    codes = model.encode(images)
    assert torch.equal(codes, model.encode(images))
    assert torch.equal(codes[2:3], model.encode(images[2:3]))


@pytest.mark.parametrize("model", [Dvae(DVAE), Vqkd(VQKD)], ids=["dvae", "vqkd"])
@pytest.mark.parametrize("shape", [(2, 3, 56, 56), (2, 1, 64, 64), (3, 64, 64)])
def test_another_grid_is_refused(model: Dvae | Vqkd, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one code for each patch"):
        model.encode(torch.rand(*shape))
    size = model.config.img_size if isinstance(model, Dvae) else (64, 64)
    with pytest.raises(ValueError, match=r"takes numbers in \[0, 1\]"):
        model.encode(torch.zeros(1, 3, *size, dtype=torch.uint8))


def test_original_names() -> None:
    names = set(Vqkd(VQKD).state_dict())
    assert {"quantize.embedding.weight", "quantize.embedding.initted", "quantize.cluster_size"} <= names
    assert {"encoder.blocks.1.attn.q_bias", "encoder.fc_norm.weight", "decoder.patch_embed.proj.weight"} <= names
    assert {"encode_task_layer.0.weight", "decode_task_layer.2.bias", "encoder.pos_embed"} <= names
    assert "blocks.group_2.block_1.id_path.w" in Dvae(DVAE).encoder.state_dict()
