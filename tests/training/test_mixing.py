"""Mixup and CutMix are timm's, and pure functions of a seed; classes are balanced by weight or by order."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import beitzoo
from beitzoo.training.balance import balanced_order, class_weights, positive_weights
from beitzoo.training.data import Order, training_transform
from beitzoo.training.generators import seed_generators
from beitzoo.training.mixing import make_mixup, mix
from beitzoo.training.objectives import ManyLabels
from beitzoo.training.processes import Processes
from beitzoo.training.sections import CropAugment, Finetune, TrainSection

CLASSES = 5


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def mixed(section: Finetune, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    mixup = make_mixup(section, CLASSES)
    assert mixup is not None
    return mix(mixup, *batch(size), seed)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_that_of_timm(options: dict[str, float]) -> None:
    """With its loss, too: labels are smoothed here by cross-entropy, and there in the targets."""
    section = Finetune(**options, mixup_prob=0.9, mixup_switch_prob=0.4)
    logits = torch.randn(6, CLASSES, dtype=torch.float64)
    for seed in range(20):
        images, targets = mixed(section, 6, seed)
        alphas = {f"{name}_alpha": options.get(name, 0.0) for name in ("mixup", "cutmix")}
        theirs = Mixup(**alphas, prob=0.9, switch_prob=0.4, label_smoothing=0.1, num_classes=CLASSES)
        seed_generators(seed)
        expected, smoothed = theirs(*batch(6))
        assert torch.equal(images, expected)
        loss = torch.nn.functional.cross_entropy(logits, targets.double(), label_smoothing=0.1)
        assert loss.item() == pytest.approx(SoftTargetCrossEntropy()(logits, smoothed).item(), rel=1e-6)


def test_plain_smoothing_is_that_of_timm() -> None:
    logits, labels = torch.randn(6, CLASSES, dtype=torch.float64), batch(6)[1]
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(LabelSmoothingCrossEntropy(0.1)(logits, labels).item(), rel=1e-12)


def test_mixed_and_weighted_labels_are_those_of_timm() -> None:
    """Several of an image: smoothed here by the loss after mixing, and there in the targets before it."""
    section = Finetune(labels="many", mixup=0.8, cutmix=1.0, label_smoothing=0.1, balance="loss")
    images, _ = batch(6)
    several = (torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    several[0] = 1
    weights = torch.tensor([(6 - count) / count for count in several.sum(0).tolist()], dtype=torch.float64)
    logits = torch.randn(6, CLASSES, dtype=torch.float64)
    mixup = make_mixup(section, CLASSES)
    assert mixup is not None
    for seed in range(5):
        ours, targets = mix(mixup, images.clone(), several, seed)
        theirs = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES, multi_label=True)
        seed_generators(seed)
        expected, smoothed = theirs(images.clone(), several)
        assert torch.equal(ours, expected)
        loss = ManyLabels(section, several.sum(0), len(several)).loss(logits, targets)
        positive, negative = logits.sigmoid().log() * weights, (-logits).sigmoid().log()
        plain = -(smoothed * positive + (1 - smoothed) * negative).mean()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_class_that_no_image_has_or_all_have_weighs_one() -> None:
    """There is nothing to balance; with a weight of 0 what all images have would never be learned."""
    assert positive_weights(torch.tensor([3.0, 0, 1, 2]), 3).tolist() == [1, 1, 2, 0.5]


def test_mixing_draws_from_nothing_but_its_seed() -> None:
    section = Finetune(mixup=0.8, cutmix=1.0)
    seed_generators(1)
    first = mixed(section, 4, seed=7)
    drawn = np.random.rand(), torch.rand(1)
    seed_generators(1)
    assert drawn == (np.random.rand(), torch.rand(1))
    assert all(map(torch.equal, first, mixed(section, 4, seed=7)))
    assert not torch.equal(first[0], mixed(section, 4, seed=8)[0])


@pytest.mark.parametrize("size", [0, 1, 5])
def test_the_last_image_of_an_odd_batch_stays(size: int) -> None:
    images, targets = mixed(Finetune(mixup=0.8), size, seed=0)
    plain, labels = batch(size)
    assert images.shape == plain.shape
    assert targets.shape == (size, CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(size))
    if size:
        assert torch.equal(images[-1], plain[-1])
        assert targets[-1].argmax() == labels[-1]
        assert targets[-1].max() == 1
    if size > 1:
        assert not torch.equal(images[0], plain[0])


def test_nothing_is_mixed_unless_asked_for() -> None:
    assert make_mixup(Finetune(mixup_prob=1.0), CLASSES) is None


def test_class_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 6 + [1] * 3 + [3]
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert class_weights(labels, CLASSES).tolist() == pytest.approx([*expected[:2], 0, expected[2], 0])
    assert class_weights(labels, CLASSES)[torch.tensor(labels)].mean() == pytest.approx(1)


def test_a_balanced_order_has_as_many_of_each_class() -> None:
    """And none of a class twice before all of it were there once; rare and missing classes too."""
    labels = torch.tensor([0] * 20 + [1] * 4 + [3] * 1)[torch.randperm(25, generator=torch.Generator().manual_seed(0))]
    orders = [balanced_order(labels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    for order in orders:
        assert len(order) == 25
        sizes = Counter(labels[order].tolist())
        assert sorted(sizes) == [0, 1, 3]
        assert sorted(sizes.values()) == [8, 8, 9]
        shown = Counter(order.tolist())
        assert {max(shown[place] for place in (labels == 0).nonzero().flatten().tolist())} == {1}
        rare = [shown[place] for place in (labels == 1).nonzero().flatten().tolist()]
        assert max(rare) - min(rare) <= 1
    assert labels[orders[0]].tolist() != sorted(labels[orders[0]].tolist())


def test_which_class_has_one_more_is_drawn() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    ones = [int((labels[balanced_order(labels, torch.Generator().manual_seed(s))] == 1).sum()) for s in range(40)]
    assert set(ones) == {2, 3}


def test_seeds_are_those_of_the_pieces_whoever_has_them() -> None:
    """Two processes mix as one does in two parts, and a run that goes on as one that was not stopped."""

    def seeds(rank: int, processes: int, accumulation: int, update: int = 0) -> list[int]:
        train = TrainSection(epochs=1, batch_size=4, lr=1.0, accumulation=accumulation)
        order = Order(range(8), train, Processes(rank, processes, torch.device("cpu")))
        return list(islice(order.seeds(update), 6))

    alone = seeds(0, 1, 2)
    assert len(set(alone)) == 6
    assert [seeds(0, 2, 1)[:3], seeds(1, 2, 1)[:3]] == [alone[::2], alone[1::2]]
    assert seeds(0, 1, 2, update=2)[:2] == alone[4:]


def test_erasing_and_policies_are_those_of_timm() -> None:
    """The same seed draws the same image from timm's own transform, erased pixel by pixel."""
    model = beitzoo.create_model("test_beit", device="meta")
    augment = CropAugment(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.9, re_mode="pixel")
    ours = training_transform(model, augment)
    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.9, "re_mode": "pixel"}
    theirs = timm.data.create_transform(**{**config, **options}, is_training=True)
    image = Image.radial_gradient("L").convert("RGB")
    for seed in range(5):
        drawn = []
        for transform in (ours, theirs):
            seed_generators(seed)
            drawn.append(transform(image))
        assert torch.equal(*drawn)
