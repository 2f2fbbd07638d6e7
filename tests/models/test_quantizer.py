"""What a codebook learns is what a slow, obvious reference in double precision learns; gradients pass the rounding."""

import numpy as np
import pytest
import torch
from oracles import randomise
from torch.nn import functional as F

from beitzoo.models.quantizer import Quantizer, kmeans, perplexity
from beitzoo.models.tokenizers import Vqkd
from beitzoo.zoo.networks import BeitConfig, VqkdConfig

PLAIN = {"embed_dim": 24, "num_heads": 2, "num_classes": 0, "use_abs_pos_emb": True, "use_rel_pos_bias": False}


def small(target: str = "features", in_chans: int = 3) -> Vqkd:
    encoder = BeitConfig(**PLAIN, init_values=0.0, depth=1, img_size=(12, 16), patch_size=(4, 4), in_chans=in_chans)
    decoder = BeitConfig(**PLAIN, init_values=0.0, depth=1, img_size=(3, 4), patch_size=(1, 1), in_chans=6)
    config = VqkdConfig(encoder=encoder, decoder=decoder, vocab_size=20, code_dim=6, teacher_dim=10, target=target)
    return Vqkd(config)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_one_update_of_the_codebook_is_the_reference() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(9, 5)
    weight = quantizer.embedding.weight.double().numpy().copy()
    quantizer.embedding.cluster_size.data.fill_(2.0)
    features = F.normalize(torch.randn(2, 4, 5), dim=-1)
    flat = features.flatten(0, 1).double().numpy()
    nearest = [int(np.argmin([((row - code) ** 2).sum() for code in weight])) for row in flat]
    codes = quantizer(features)
    assert codes.flatten().tolist() == nearest
    quantizer.learn(quantizer.tally(features, codes), decay=0.9)
    for code in range(9):
        members = [row for row, found in zip(flat, nearest, strict=True) if found == code]
        moved = 0.1 * unit(np.mean(members, axis=0)) if members else 0.1 * weight[code]
        expected = unit(0.9 * weight[code] + moved)
        np.testing.assert_allclose(quantizer.embedding.weight[code].numpy(), expected, atol=1e-6)
        assert float(quantizer.cluster_size[code]) == len(members)
        np.testing.assert_allclose(float(quantizer.embedding.cluster_size[code]), 1.8 + 0.1 * len(members), rtol=1e-6)
    assert len(set(nearest)) < 9
    shares = np.bincount(nearest) / len(nearest)
    shares = shares[shares > 0]
    assert perplexity(quantizer.cluster_size) == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))


def test_unused_codes_stay_and_parts_add_up() -> None:
    """Two processes with half of the features each learn what one learns from all: only tallies are exchanged."""
    torch.manual_seed(0)
    quantizer = Quantizer(9, 5)
    features = F.normalize(torch.randn(40, 5), dim=-1)
    codes = quantizer(features)
    whole = quantizer.tally(features, codes)
    halves = quantizer.tally(features[:13], codes[:13]) + quantizer.tally(features[13:], codes[13:])
    torch.testing.assert_close(whole, halves, rtol=1e-14, atol=1e-14)
    before = quantizer.embedding.weight.clone()
    quantizer.learn(quantizer.tally(features[codes == 3], codes[codes == 3]), decay=0.99)
    changed = (quantizer.embedding.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3]


def test_kmeans_is_the_reference() -> None:
    features = torch.randn(60, 4)
    found = kmeans(features, 7, torch.Generator().manual_seed(1))
    rows = np.stack([unit(row) for row in features.double().numpy()])
    drawn = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:7].tolist()
    centres = [rows[i] for i in drawn]
    for _ in range(10):
        nearest = [int(np.argmax([row @ centre for centre in centres])) for row in rows]
        for code in range(7):
            members = [row for row, found_code in zip(rows, nearest, strict=True) if found_code == code]
            if members:
                centres[code] = unit(np.mean(members, axis=0))
    np.testing.assert_allclose(found.numpy(), np.stack(centres), atol=1e-6)


def test_kmeans_of_fewer_features_than_codes() -> None:
    features = torch.randn(3, 4)
    found = kmeans(features, 8, torch.Generator().manual_seed(1))
    near = (found @ F.normalize(features, dim=1).t()).max(1).values
    torch.testing.assert_close(near, torch.ones(8))


def test_a_start_counts_no_use_and_no_code_as_dead() -> None:
    quantizer = Quantizer(8, 4)
    quantizer.embedding.initted.zero_()
    quantizer.cluster_size.fill_(7.0)
    before = quantizer.embedding.weight.clone()
    quantizer.start(torch.randn(40, 4), None)
    assert torch.equal(quantizer.embedding.weight, before)
    assert quantizer.cluster_size.tolist() == [0.0] * 8
    assert quantizer.embedding.initted.tolist() == [1.0]
    assert quantizer.embedding.cluster_size.tolist() == [5.0] * 8
    quantizer.start(torch.randn(40, 4), torch.Generator())
    assert not torch.equal(quantizer.embedding.weight, before)


def test_dead_codes_are_those_not_used_for_so_many_updates() -> None:
    quantizer = Quantizer(4, 4)
    quantizer.start(torch.randn(8, 4), None)
    only = torch.zeros(4, 5, dtype=torch.float64)
    only[:, -1] = torch.tensor([5.0, 1.0, 2.0, 0.0])
    found = []
    for _ in range(24):
        quantizer.learn(only, decay=0.9)
        found.append(quantizer.dead(20, decay=0.9).tolist())
    assert found[:19] == [[]] * 19
    assert found[20:] == [[3]] * 4
    replacement = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    quantizer.restart(torch.tensor([3]), replacement)
    torch.testing.assert_close(quantizer.embedding.weight[3], torch.tensor([0.6, 0.0, 0.8, 0.0]))
    assert quantizer.dead(20, decay=0.9).tolist() == []


@pytest.mark.parametrize("target", ["features", "pixels"])
def test_gradients_pass_the_rounding_and_codes_get_none(target: str) -> None:
    """Prediction and commitment, and their gradients in the encoder, of a plain reference in double precision."""
    model = small(target).double()
    for part in (model.encoder, model.decoder, model.encode_task_layer, model.decode_task_layer):
        randomise(part)
    images = torch.rand(2, 3, 12, 16, dtype=torch.float64)
    found = model(images)
    wanted = torch.randn_like(found.prediction)
    (F.mse_loss(found.prediction, wanted) + 0.7 * found.commitment).backward()
    gradient = model.encode_task_layer[2].weight.grad.clone()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.quantize.embedding.weight.grad is None

    unit_features = F.normalize(model.features(images), dim=-1)
    vectors = model.quantize.embedding.weight[found.codes].clone().requires_grad_()
    prediction = model._predict(vectors.unflatten(1, (3, 4)))
    torch.testing.assert_close(prediction, found.prediction)
    (at_codes,) = torch.autograd.grad(F.mse_loss(prediction, wanted), vectors)
    commitment = (unit_features - vectors.detach()).square().mean()
    torch.testing.assert_close(found.commitment, commitment)
    weight = model.encode_task_layer[2].weight
    (through,) = torch.autograd.grad(unit_features, weight, at_codes, retain_graph=True)
    (committed,) = torch.autograd.grad(commitment, weight)
    torch.testing.assert_close(gradient, through + 0.7 * committed)
    assert float(through.norm()) > 0


def test_codes_decode_to_images_where_pixels_are_the_target() -> None:
    model = small("pixels", in_chans=2)
    images = torch.rand(3, 2, 12, 16)
    targets = model.pixel_targets(images)
    assert targets.shape == (3, 12, 2 * 16)
    assert torch.equal(targets[1, 5].unflatten(0, (2, 4, 4)), 2 * images[1, :, 4:8, 4:8] - 1)
    model._predict = lambda vectors: targets  # type: ignore[method-assign]
    torch.testing.assert_close(model.decode(torch.zeros(3, 3, 4, dtype=torch.int64)), images)


def test_features_are_rounded_in_float32_under_autocast() -> None:
    model = small()
    images = torch.rand(64, 3, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    assert torch.equal(found.codes, model.quantize(found.features))
    assert found.features.dtype == found.commitment.dtype == torch.float32
    assert found.prediction.dtype == torch.bfloat16


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target='depth'.*'features' or 'pixels'"):
        small("depth")
