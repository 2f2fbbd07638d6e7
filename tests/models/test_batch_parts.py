"""A batch in parts at the same time gives the outputs of the whole batch, and is whole wherever one could tell."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from inference_copies import made_of
from oracles import randomise, relative_error
from torch import Tensor, nn

import beitzoo
from beitzoo import Beit, optimize
from beitzoo.models import choosing, kernels
from beitzoo.models import optimize as optimize_module
from beitzoo.models.choices import Choice, Choices
from beitzoo.models.inference_block import InferenceBlock
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.segmentation import Segmenter
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.networks import MimConfig, SegmenterConfig

THREADS = 2


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Say of every pass in how many parts its batch was."""
    seen: list[int] = []
    at_once = optimize_module.at_once

    def count(calls: list[Callable[[], list[Tensor]]], threads: int) -> list[list[Tensor]]:
        assert len(calls) * threads == THREADS
        seen.append(len(calls))
        return at_once(calls, threads)

    monkeypatch.setattr(optimize_module, "at_once", count)
    return seen


def build(**fields: object) -> Beit:
    model = Beit(replace(ARCHITECTURES["test_beit"], **fields)).eval()
    randomise(model)
    return model


def cut(model: Beit, linear: str = "packed", parts: int = 2, images: str = "all", dtype: str = "float32") -> Choices:
    choices = made_of(model, linear, "blocked", images, dtype)
    return replace(choices, batch_parts=Choice(str(parts)), threads=THREADS)


@pytest.mark.parametrize(
    ("linear", "images", "fields"),
    [
        ("packed", "all", {}),
        ("packed_for_tokens", "1", {"use_shared_rel_pos_bias": True}),
        ("convolution", "all", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
    ],
)
@pytest.mark.parametrize("ready_bytes", [0, 1 << 30])
def test_parts_give_what_the_batch_gives(
    linear: str,
    images: str,
    fields: dict[str, object],
    ready_bytes: int,
    parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimize_module, "READY_BYTES", ready_bytes)
    model = build(use_mask_token=True, **fields)
    fast = optimize(model, choices=cut(model, linear, images=images))
    x, masked = torch.randn(4, 3, 64, 64), torch.rand(4, 16) < 0.5
    with torch.inference_mode():
        for ours, theirs in [
            (fast(x), model(x)),
            (fast.forward_features(x, masked), model.forward_features(x, masked)),
            (fast.attention_maps(x), model.attention_maps(x)),
            *zip(
                *(each.forward_intermediates(x, [0, 1], intermediates_only=True) for each in (fast, model)), strict=True
            ),
        ]:
            assert relative_error(ours, theirs) <= 1e-5
        assert parts == [2] * 4
        assert torch.equal(fast(x), fast(x))


@pytest.mark.parametrize(("batch", "taken"), [(4, [2]), (3, []), (1, []), (0, [])])
def test_a_batch_is_in_in_parts_where_they_divide_it(batch: int, taken: list[int], parts: list[int]) -> None:
    model = build()
    fast, x = optimize(model, choices=cut(model)), torch.randn(batch, 3, 64, 64)
    with torch.inference_mode():
        assert fast(x).shape == (batch, model.num_classes)
    assert parts == taken


def test_where_one_could_tell_a_batch_is_whole(parts: list[int]) -> None:
    model = build()
    fast, x = optimize(model, choices=cut(model)), torch.randn(4, 3, 64, 64)
    expected = fast(x)  # gradients are on
    batches: list[int] = []
    block = fast.blocks[0]
    assert isinstance(block, InferenceBlock)
    handle = block.norm1.register_forward_hook(lambda *a: batches.append(len(a[2])))
    with torch.inference_mode():
        fast(x)
    handle.remove()
    assert batches == [4]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with torch.inference_mode():
        fast(x)
    handle.remove()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(x)
    torch.set_num_threads(1)
    with torch.no_grad():
        fast(x)
        assert parts == []
        torch.set_num_threads(THREADS)
        assert relative_error(fast(x), expected) <= 1e-5
    assert parts == [2]


def test_copies_of_a_copy_work_in_parts_and_threads_share_it(parts: list[int]) -> None:
    model = build()
    fast, x = optimize(model, choices=cut(model)), torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        expected = fast(x)
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(copied(x), expected)
    assert parts == [2] * 3
    found: dict[int, Tensor] = {}

    def run(n: int) -> None:
        torch.set_num_threads(THREADS)
        with torch.inference_mode():
            found[n] = fast(x)

    callers = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(60)
    assert all(torch.equal(found[n], expected) for n in range(4))
    assert parts == [2] * 7


def test_what_holds_a_copy_works_in_parts_or_whole(parts: list[int]) -> None:
    x = torch.randn(4, 3, 64, 64)
    features = beitzoo.create_model("test_beit", features_only=True, out_indices=[0, 1]).eval()
    segmenter = Segmenter(build(depth=4), SegmenterConfig(num_classes=3, decoder="linear", out_indices=(2,))).eval()
    masked = MaskedImageModel(
        build(use_mask_token=True, use_fc_norm=False, num_classes=0, global_pool="token"), MimConfig(vocab_size=9)
    ).eval()
    places = torch.rand(4, 16) < 0.5
    for model, backbone, inputs, in_parts in [
        (features, features.backbone, (x,), [2]),
        (segmenter, segmenter.backbone, (x,), [2]),
        (masked, masked.backbone, (x, places), []),
    ]:
        fast = optimize(model, choices=cut(backbone))
        parts.clear()
        with torch.inference_mode():
            ours, theirs = fast(*inputs), model(*inputs)
        for a, b in zip(*((each if isinstance(each, list) else [each]) for each in (ours, theirs)), strict=True):
            assert relative_error(a, b) <= 1e-5
        assert parts == in_parts


@pytest.mark.parametrize(
    ("batch", "whole", "part", "taken"), [(4, 1.0, 1.5, "2"), (4, 1.0, 2.5, "1"), (3, 1.0, 0.1, "1")]
)
def test_parts_are_taken_where_they_are_measured_to_be_faster(
    batch: int, whole: float, part: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an image takes in a part, with its share of the threads, and in the whole batch."""
    now = threading.local()  # each thread has a time of its own

    def clock() -> float:
        now.seconds = float(getattr(now, "seconds", 0.0)) + 1e-6
        return now.seconds

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        own = torch.get_num_threads() < THREADS
        now.seconds = clock() + qkv.shape[1] * (part if own else whole)
        return kernels.attend(qkv, bias)

    monkeypatch.setattr(choosing, "ATTENTIONS", {"fused": attend})
    choices = choosing.choose(build(), torch.float32, (batch, 3, 64, 64), clock)
    assert choices.batch_parts.taken == taken
    assert choices.batch_parts.speedup == (pytest.approx(2 * whole / part, rel=1e-3) if taken == "2" else 1.0)


@pytest.mark.parametrize("field", ["batch_parts", "images_at_a_time"])
@pytest.mark.parametrize("taken", ["two", "0", "-1"])
def test_counts_that_are_none_are_refused(field: str, taken: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"{field}='{taken}'; use"):
        optimize(model, choices=replace(cut(model), **{field: Choice(taken)}))  # type: ignore[arg-type]


def test_parts_that_do_not_divide_the_threads_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="divides their 2 threads"):
        optimize(model, choices=cut(model, parts=4))
