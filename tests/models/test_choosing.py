"""What an inference copy is made of is chosen by a clock, and by nothing else."""

import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from inference_copies import made_of
from oracles import randomise, relative_error
from torch import Tensor

from beitzoo import Beit, optimize
from beitzoo.models import choosing, int8, kernels, packed
from beitzoo.models.choices import Choices
from beitzoo.models.inference_linear import InferenceLinear
from beitzoo.zoo.architectures import ARCHITECTURES


class Clock:
    """A clock that all but stands still, except for the work that says how long it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def build(**fields: object) -> Beit:
    model = Beit(replace(ARCHITECTURES["test_beit"], **fields)).eval()
    randomise(model)
    return model


# ---- one race -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", list(itertools.permutations([1.0, 1.5, 4.0])))
def test_the_fastest_is_taken(seconds: tuple[float, ...]) -> None:
    clock = Clock()
    calls = {name: [partial(clock.work, took)] * 3 for name, took in zip("abc", seconds, strict=True)}
    choice = choosing.race(calls, clock)
    assert choice.taken == "abc"[seconds.index(1.0)]
    assert choice.speedup == pytest.approx(seconds[0] / 1.0)


@pytest.mark.parametrize(("seconds", "taken"), [(0.99, "plain"), (0.97, "other")])
def test_the_plainer_stays_unless_another_is_clearly_faster(seconds: float, taken: str) -> None:
    clock = Clock()
    calls = {"plain": [partial(clock.work, 1.0)], "other": [partial(clock.work, seconds)]}
    assert choosing.race(calls, clock).taken == taken


def test_disturbances_do_not_decide() -> None:
    """Every second call of the faster one is disturbed, and the first one of the other."""
    clock = Clock()
    fast, slow = itertools.cycle([0.05, 0.01]), itertools.chain([0.03], itertools.repeat(0.012))
    calls = {"slow": [lambda: clock.work(next(slow))], "fast": [lambda: clock.work(next(fast))]}
    choice = choosing.race(calls, clock)
    assert (choice.taken, choice.speedup) == ("fast", pytest.approx(1.2))


def test_losers_are_not_tried_again_and_time_is_kept() -> None:
    clock, tries = Clock(), dict.fromkeys(("short", "long"), 0)

    def work(name: str, seconds: float) -> None:
        tries[name] += 1
        clock.work(seconds)

    choosing.race({"short": [partial(work, "short", 0.05)], "long": [partial(work, "long", 5.0)]}, clock)
    assert tries == {"short": 2, "long": 2}
    choosing.race({"short": [partial(work, "short", 0.05)], "long": [partial(work, "long", 0.051)]}, clock)
    assert tries["short"] == tries["long"] == 2 + 2  # 0.1 s each turn, until more than 0.2 s are over


def test_work_counts_not_calls() -> None:
    clock = Clock()
    calls = {"all": [partial(clock.work, 8.0)], "1": [partial(clock.work, 0.9)]}
    assert choosing.race(calls, clock, {"all": 8, "1": 1}).taken == "1"


def test_a_single_candidate_is_not_timed() -> None:
    def fail() -> None:
        raise AssertionError

    assert choosing.race({"plain": [fail]}, Clock()).speedup == 1.0


# ---- all of them --------------------------------------------------------------------------------------------


@pytest.fixture
def made_slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], Clock]]:
    """Make everything but what is named take a second more each time on a clock that otherwise stands still."""

    def arrange(fast: dict[str, str]) -> Clock:
        clock = Clock()
        use, attentions = choosing._use, dict(choosing.ATTENTIONS)

        def slow(call: Callable[..., object], *args: Tensor) -> object:
            clock.work(1.0)
            return call(*args)

        def timed_use(name: choosing.LinearName, linear: InferenceLinear, *tensors: Tensor) -> choosing.Call:
            call = use(name, linear, *tensors)
            return call if _kind_of(linear) == fast[name] else partial(slow, call)

        monkeypatch.setattr(choosing, "_use", timed_use)
        for name, attend in attentions.items():
            if name != fast["attention"]:
                monkeypatch.setitem(choosing.ATTENTIONS, name, partial(slow, attend))
        return clock

    yield arrange


def _kind_of(linear: InferenceLinear) -> str:
    if type(linear) is packed.PackedLinear:
        return "packed" if linear.tokens is None else "packed_for_tokens"
    names = {
        InferenceLinear: "plain",
        packed.PackedGeluBehind: "packed_gelu_behind",
        packed.ConvolutionLinear: "convolution",
        int8.Int8Linear: "int8",
        int8.Int8ImageLinear: "int8_image",
    }
    return names[type(linear)]


@pytest.mark.parametrize(
    "fast",
    [
        {"qkv": "plain", "proj": "packed", "fc1": "packed_gelu_behind", "fc2": "convolution", "attention": "blocked"},
        {"qkv": "packed_for_tokens", "proj": "plain", "fc1": "packed", "fc2": "plain", "attention": "fused"},
        {"qkv": "convolution", "proj": "convolution", "fc1": "plain", "fc2": "packed", "attention": "blocked"},
    ],
    ids=lambda fast: "-".join(fast.values()),
)
def test_each_part_is_chosen_by_the_clock_and_gives_the_models_outputs(
    fast: dict[str, str], made_slow: Callable[[dict[str, str]], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not {"packed", "convolution"} <= set(packed.linears_for(torch.empty(1), torch.float32)):
        pytest.skip("this PyTorch has no oneDNN")
    clock = made_slow(fast)
    monkeypatch.setattr(choosing.Trial, "block", lambda *_: choosing.Choice("chosen", 1.5))
    model, x = build(), torch.randn(3, 3, 64, 64)
    choices = choosing.choose(model, torch.float32, (3, 3, 64, 64), clock)
    assert {name: getattr(choices, name).taken for name in fast} == fast
    copy = optimize(model, choices=choices)
    assert copy.choices.block.speedup == 1.5
    with torch.inference_mode():
        assert relative_error(copy(x), model(x)) <= 1e-5
        assert torch.equal(copy(x), copy(x))


@pytest.mark.parametrize(
    "fast",
    [
        {"qkv": "int8", "proj": "int8_image", "fc1": "int8", "fc2": "int8_image", "attention": "blocked_bfloat16"},
        {"qkv": "int8_image", "proj": "int8", "fc1": "int8_image", "fc2": "int8", "attention": "fused"},
    ],
    ids=lambda fast: "-".join(fast.values()),
)
def test_kinds_of_8_bits_are_chosen_by_the_clock_too(
    fast: dict[str, str], made_slow: Callable[[dict[str, str]], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fast["attention"] == "blocked_bfloat16" and not packed.has_bfloat16():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    clock = made_slow(fast)
    monkeypatch.setattr(choosing.Trial, "block", lambda *_: choosing.Choice("chosen", 1.5))
    model, x = build(), torch.randn(3, 3, 64, 64)
    copy = optimize(model, "int8", choices=choosing.choose(model, "int8", (3, 3, 64, 64), clock))
    assert {name: getattr(copy.choices, name).taken for name in fast} == fast
    with torch.inference_mode():
        assert relative_error(copy(x), model(x)) <= (0.02 if kernels.cpu_has("vnni") else 0.04)


def test_choices_together_are_held_against_the_plain_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    add = packed.PackedLinear.add

    def slow_add(self: packed.PackedLinear, *tensors: Tensor) -> Tensor:
        clock.work(1.0)
        return add(self, *tensors)

    monkeypatch.setattr(choosing.Trial, "linear", lambda *_: choosing.Choice("packed", 9.0))
    monkeypatch.setattr(packed.PackedLinear, "add", slow_add)
    one = choosing.Choice("1", 2.0)
    monkeypatch.setattr(choosing.Trial, "cut", lambda _, choices: replace(choices, images_at_a_time=one))
    choices = choosing.choose(build(), torch.float32, (2, 3, 64, 64), clock)
    assert (choices.block.taken, choices.fc2.taken, choices.fc2.speedup) == ("plain", "plain", 1.0)
    assert choices.images_at_a_time == one  # in which both were measured


@pytest.mark.parametrize("batch", [1, 2, 5, 12])
def test_a_batch_is_cut_into_what_was_measured_where_that_was_faster(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = Clock(), []

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(qkv.shape[1])
        clock.work(1.0 if seen[-1] == 4 else 0.3 * seen[-1])  # fours are the fastest
        return kernels.attend(qkv, bias)

    monkeypatch.setitem(choosing.ATTENTIONS, "fused", attend)
    model = build()
    choices = choosing.choose(model, torch.float32, (batch, 3, 64, 64), clock)
    cut = batch > 4
    assert choices.images_at_a_time.taken == ("4" if cut else "all")
    copy = optimize(model, choices=replace(choices, attention=choosing.Choice("fused")))
    seen.clear()
    x = torch.randn(batch, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(copy(x), model(x)) <= 1e-5
    assert set(seen) == {{5: 1, 12: 4}.get(batch, batch)}


def test_bfloat16_of_any_choice_is_as_near() -> None:
    if "packed" not in packed.linears_for(torch.empty(1), torch.bfloat16):
        pytest.skip("this CPU has no bfloat16 arithmetic")
    model, x = build(), torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        for kinds in itertools.product(["plain", "packed", "packed_gelu_behind"], ["fused", "blocked"], ["all", "1"]):
            copy = optimize(model, torch.bfloat16, choices=made_of(model, *kinds, dtype="bfloat16"))
            assert relative_error(copy(x).float(), expected) <= 3e-2


# ---- the record ---------------------------------------------------------------------------------------------


def test_choices_say_what_was_taken_and_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(), torch.randn(2, 3, 64, 64)
    first = optimize(model, images_like=(2, 3, 64, 64))
    choices = first.choices
    assert (choices.dtype, choices.images_like, choices.threads) == ("float32", (2, 3, 64, 64), torch.get_num_threads())
    assert choices.instructions == tuple(
        f for f in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile") if kernels.cpu_has(f)
    )
    monkeypatch.setattr(choosing, "choose", None)  # nothing is measured again
    for again in (choices, json.loads(json.dumps(choices.to_dict()))):
        copy = optimize(model, choices=again)
        assert copy.choices == choices
        assert torch.equal(copy(x), first(x))
    assert pickle.loads(pickle.dumps(first)).choices == choices
    assert Choices.from_dict(choices.to_dict()) == choices


def test_choices_of_another_network_dtype_or_machine_are_refused() -> None:
    model = build()
    choices = made_of(model, "plain")
    for other, dtype, text in [
        (build(embed_dim=128), None, "of 2 blocks, 64 channels, 2 heads and 256 hidden channels in float32; this one"),
        (model, torch.float64, "in float32; this one is of 2 blocks, .* in float64"),
    ]:
        with pytest.raises(ValueError, match=text):
            optimize(other, dtype, choices=choices)
    with pytest.raises(ValueError, match=r"qkv='rolled'; on this machine .* there are plain.*Leave them out"):
        optimize(model, choices=made_of(model, "rolled"))
    with pytest.raises(ValueError, match="attention='none'; use fused, blocked"):
        optimize(model, choices=made_of(model, "plain", "none"))
    with pytest.raises(ValueError, match=r"choices that optimize\(\) did not make: qkv"):
        optimize(model, choices={**choices.to_dict(), "qkv": 3})
    with pytest.raises(ValueError, match="Got images_like and choices"):
        optimize(model, choices=choices, images_like=(1, 3, 64, 64))


@pytest.mark.parametrize("images_like", [(1, 3, 64), (0, 3, 64, 64), (1, 3, 32, 64), (1, 1, 64, 64)])
def test_images_that_a_model_does_not_take_are_refused(images_like: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"images_like=|images of shape"):
        optimize(build(), images_like=images_like)


def test_measuring_leaves_the_random_numbers_alone() -> None:
    model = build()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    optimize(model)
    assert torch.equal(torch.rand(1), expected)
