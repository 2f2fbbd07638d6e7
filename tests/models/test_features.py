"""What a timm user finds on the network beyond logits."""

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from oracles import randomise, relative_error, timm_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

import beitzoo
from beitzoo import Beit
from beitzoo.models.kernels import attend
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = replace(ARCHITECTURES["test_beit"], depth=4)


def build(**fields: object) -> Beit:
    model = Beit(replace(SMALL, **fields)).eval()
    randomise(model)
    return model


def images(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(batch, 3, *size)


@pytest.mark.parametrize("indices", [None, 2, [0, 3], [-1, 1]])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("options", [{}, {"return_prefix_tokens": True}, {"stop_early": True}], ids=str)
def test_intermediates_are_timms(indices: int | list[int] | None, output_fmt: str, options: dict[str, bool]) -> None:
    model = build(img_size=(48, 80), global_pool="token")
    theirs = timm_model(model)
    x = images(size=(48, 80))
    arguments = {"indices": indices, "output_fmt": output_fmt, "norm": True, **options}
    ours, others = model.forward_intermediates(x, **arguments), theirs.forward_intermediates(x, **arguments)
    assert relative_error(ours[0], others[0]) < 1e-5
    assert len(ours[1]) == len(others[1])
    for a, b in zip(ours[1], others[1], strict=True):
        for left, right in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b], strict=True):
            assert left.shape == right.shape
            assert relative_error(left, right) < 1e-5
    only = model.forward_intermediates(x, intermediates_only=True, **arguments)
    assert isinstance(only, list)


def test_norm_of_intermediates_is_the_trained_one_behind_pooling_too() -> None:
    model = build()
    raw, normed = (model.forward_intermediates(images(), 1, norm=n, intermediates_only=True)[0] for n in (False, True))
    assert raw.shape == normed.shape
    torch.manual_seed(0)
    x = images()
    tokens = model.forward_features(x)
    (normed,) = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed, model.fc_norm(tokens)[:, 1:])


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], []])
def test_blocks_that_are_not_there_are_named(indices: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"there are 4 blocks, 0 to 3 or -4 to -1"):
        build().forward_intermediates(images(), indices)


def test_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="'NHWC'; there are NCHW, NLC"):
        build().forward_intermediates(images(), output_fmt="NHWC")  # type: ignore[arg-type]


def test_pruning_keeps_what_the_chosen_blocks_need() -> None:
    model = build()
    x = images()
    expected = model.forward_intermediates(x, [1, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([1, -2], prune_norm=True) == [1, 2]
    assert len(model.blocks) == model.config.depth == 3
    assert isinstance(model.head, nn.Identity)
    assert isinstance(model.fc_norm, nn.Identity)
    for a, b in zip(expected, model.forward_intermediates(x, [1, 2], intermediates_only=True), strict=True):
        assert torch.equal(a, b)


def test_features_only_gives_maps_and_says_what_they_are() -> None:
    torch.manual_seed(1)
    features = beitzoo.create_model("test_beit", features_only=True, out_indices=[0, 1]).eval()
    maps = features(images())
    assert [tuple(m.shape) for m in maps] == [(2, 64, 4, 4)] * 2
    info = features.feature_info
    assert (info.channels(), info.reduction(), info.module_name()) == ([64, 64], [16, 16], ["blocks.0", "blocks.1"])
    expected = features.backbone.forward_intermediates(images(), [0, 1], intermediates_only=True)
    assert [m.shape for m in expected] == [m.shape for m in maps]
    features.set_input_size((32, 96))
    assert features(images(1, (32, 96)))[0].shape == (1, 64, 2, 6)
    assert features.pretrained_cfg["input_size"] == (3, 32, 96)


def test_features_only_defaults_are_timms() -> None:
    features = beitzoo.create_model("beit_tiny_patch16_224", features_only=True, device="meta")
    assert features.out_indices == [9, 10, 11]
    assert features.feature_info.out_indices == (9, 10, 11)


def test_features_only_options_reach_the_features() -> None:
    features = beitzoo.create_model("test_beit", features_only=True, out_indices=1, norm=True, output_fmt="NLC")
    with torch.no_grad():
        features.backbone.fc_norm.bias.fill_(100)
    (patches,) = features(images())
    assert patches.shape == (2, 16, 64)
    assert (patches > 50).all()


def test_pyramid_has_four_strides_of_the_originals_blocks() -> None:
    features = beitzoo.create_model("beit_tiny_patch16_224", features_only=True, pyramid=True, img_size=64).eval()
    assert features.out_indices == [3, 5, 7, 11]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    x = images()
    maps = features(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    plain = features.backbone.forward_intermediates(x, [3, 5, 7, 11], intermediates_only=True)
    assert torch.equal(maps[2], plain[2])
    assert torch.equal(maps[3], F.max_pool2d(plain[3], 2))
    large = beitzoo.create_model("beit_large_patch16_224", features_only=True, pyramid=True, device="meta")
    assert large.out_indices == [7, 11, 15, 23]
    for name in ("beit_nano_patch4_32", "beit_small_patch16_224"):
        features = beitzoo.create_model(name, features_only=True, pyramid=True)
        x = torch.randn(1, features.backbone.in_chans, *features.backbone.config.img_size)
        sides = [m.shape[-1] for m in features(x)]
        assert [s // sides[-1] for s in sides] == [8, 4, 2, 1]
    assert beitzoo.create_model("test_beit", features_only=True, out_indices=(-1, 1)).feature_info.channels() == [64]
    with pytest.raises(ValueError, match="A pyramid is 4 NCHW maps"):
        beitzoo.create_model("test_beit", features_only=True, pyramid=True, out_indices=2)


def test_attention_maps_are_what_the_fused_path_mixes_by() -> None:
    model = build(use_shared_rel_pos_bias=True)
    x = images()
    maps = model.attention_maps(x)
    assert maps.shape == (2, 4, 2, 17, 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 2, 17))
    tokens, bias = model.embed(x)
    for index, block in enumerate(model.blocks):
        qkv = block.attn._project(block.norm1(tokens))
        fused = attend(qkv, bias.of(block.attn.relative_position_bias_table, qkv))
        assert relative_error(maps[:, index] @ qkv[2], fused) < 1e-5
        tokens = block(tokens, bias)
    chosen = model.attention_maps(x, [-1, 0])
    torch.testing.assert_close(chosen, maps[:, [3, 0]])


def test_masked_patches_are_the_mask_token_and_see_nothing_of_the_image() -> None:
    model = build(use_mask_token=True)
    x = images()
    masked = torch.zeros(2, 4, 4, dtype=torch.bool)
    masked[:, 1, 2] = True
    changed = x.clone()
    changed[:, :, 16:32, 32:48] = 9
    a, b = (model.forward_features(i, bool_masked_pos=masked) for i in (x, changed))
    assert torch.equal(a, b)
    assert torch.equal(a, model.forward_features(x, masked.flatten(1)))
    assert not torch.equal(model.forward_features(x), a)
    unmasked = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(model.forward_features(x, unmasked), model.forward_features(x))


def test_wrong_masks_are_refused() -> None:
    model = build(use_mask_token=True)
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(2, 16\)"):
        model.forward_features(images(), torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"it must be torch.bool of shape \(2, 16\)"):
        model.forward_features(images(), torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.bool of shape \(3,\)"):
        model.forward_features(images(), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Got images of shape \(3, 64, 64\)"):
        model(images()[0])
    with pytest.raises(ValueError, match="no mask token; create it with use_mask_token=True"):
        build().forward_features(images(), torch.zeros(2, 16, dtype=torch.bool))


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16), (128, 80)])
def test_a_dynamic_size_is_what_setting_the_size_gives(size: tuple[int, int]) -> None:
    fields = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}
    dynamic = build(dynamic_img_size=True, **fields)
    fixed = Beit(replace(SMALL, **fields)).eval()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(size)
    x = images(size=size)
    assert relative_error(dynamic(x), fixed(x)) < 1e-5
    dynamic(x).sum().backward()
    assert dynamic.blocks[0].attn.relative_position_bias_table.grad.abs().sum() > 0


def test_dynamic_sizes_pad_or_name_the_nearest_good_ones() -> None:
    with pytest.raises(ValueError, match=r"\(50, 64\) is not a multiple of patch_size=\(16, 16\); use 48 or 64"):
        build(dynamic_img_size=True)(images(size=(50, 64)))
    model = build(dynamic_img_pad=True)
    x = images(size=(50, 90))
    assert torch.equal(model(x), model(F.pad(x, (0, 6, 0, 14))))
    assert model.pretrained_cfg["fixed_input_size"] is False or not model.config.dynamic_img_size


def test_another_patch_size_sees_the_same_image() -> None:
    model = build()
    before = model.patch_embed.proj.weight.detach().clone()
    model.set_input_size(patch_size=8)
    assert (model.config.patch_size, model.config.grid_size) == ((8, 8), (8, 8))
    assert model(images()).shape == (2, 10)
    model = build()
    before = model.patch_embed.proj.weight.detach().clone()
    model.set_input_size(128, patch_size=32)
    assert (model.config.patch_size, model.config.grid_size) == ((32, 32), (4, 4))
    flat = torch.ones(1, 3, 32, 32)  # FlexiViT: a patch made larger gives the same token
    new = F.conv2d(flat, model.patch_embed.proj.weight)
    assert relative_error(new, F.conv2d(flat[..., :16, :16], before)) < 1e-4


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_empty_batch_gives_empty_outputs(depth: int) -> None:
    model = build()
    assert model(images(0)).shape == (0, 10)
    maps = model.forward_intermediates(images(0), intermediates_only=True)
    assert [m.shape for m in maps] == [(0, 64, 4, 4)] * 4
    assert model.attention_maps(images(0)).shape == (0, 4, 2, 17, 17)


def test_selective_checkpointing_recomputes_only_those_blocks() -> None:
    model = build().train()
    calls: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    model.set_grad_checkpointing(blocks=[0, -1])
    assert model.grad_checkpointing
    model(images()).sum().backward()
    assert calls == [0, 1, 2, 3, 3, 0]
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


@pytest.mark.slow
def test_compiles_without_a_break_and_trains() -> None:
    model = build(depth=1, use_shared_rel_pos_bias=True, use_abs_pos_emb=True)
    x = images()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    assert relative_error(output, expected) < 1e-6
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    output.sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradient) < 1e-5


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_exports(dynamic_batch: bool) -> None:
    model = build(depth=2)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic_batch else None
    program = torch.export.export(model, (images(3),), dynamic_shapes=dynamic).module()
    for batch in (1, 5) if dynamic_batch else (3,):
        x = images(batch)
        assert relative_error(program(x), model(x)) < 1e-6


def test_copies_pickles_and_channels_last_give_the_same() -> None:
    model = build(use_shared_rel_pos_bias=True)
    x = images()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    last = x.to(memory_format=torch.channels_last)
    assert relative_error(model(last), expected) < 1e-5
    assert relative_error(model.to(memory_format=torch.channels_last)(last), expected) < 1e-5


def test_changes_made_under_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = beitzoo.create_model("test_beit", use_abs_pos_emb=True)
        model.set_input_size(96)
        model.set_in_chans(1)
        model.reset_classifier(3)
        model(torch.randn(1, 1, 96, 96))
    model(torch.randn(2, 1, 96, 96)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fake_tensors_leave_nothing_behind() -> None:
    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(model(images()), FakeTensor)
    assert type(model(images()).detach()) is Tensor


def test_pruning_keeps_the_stochastic_depth_of_the_blocks() -> None:
    model = build(drop_path_rate=0.6)
    model.prune_intermediate_layers([1])
    assert model.config.drop_path_rate == pytest.approx(0.2)


def test_threads_share_a_model() -> None:
    model = build()
    batches = [images(1 + i % 3) for i in range(12)]
    with torch.inference_mode():
        expected = [model(x) for x in batches]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.inference_mode():
            found[index] = model(batches[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative_error(found[i], expected[i]) < 1e-6 for i in range(12))
