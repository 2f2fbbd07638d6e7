"""Choosing by measuring: the fastest of what a block can be made of, on this machine and for these images.

Everything is timed as it will run: with this number of tokens and threads, with the weights of one block after the
other, so that they come from memory and not from the cache, and with one candidate after the other, so that what else
the machine does disturbs all of them alike. A plainer candidate is left only for one that is clearly faster.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from beitzoo.errors import InvalidValueError
from beitzoo.models import inputs, kernels
from beitzoo.models.at_once import at_once
from beitzoo.models.beit import Beit, Block
from beitzoo.models.choices import Choice, Choices, ImagesLike, dtype_name, network_of
from beitzoo.models.inference_block import Attend, InferenceBlock, Parts
from beitzoo.models.inference_linear import InferenceLinear, MakeLinear
from beitzoo.models.kernels import PositionBias
from beitzoo.models.packed import has_bfloat16, linears_for

Clock = Callable[[], float]
Call = Callable[[], object]
Dtype = torch.dtype | Literal["int8"]
LinearName = Literal["qkv", "proj", "fc1", "fc2"]

NOISE = 0.02  # of two times that differ by less, neither is the shorter one
LOSER = 1.2  # times the shortest time: not tried again
FEWEST_TURNS, MOST_TURNS = 2, 12
SECONDS = 0.2  # for one choice, once every candidate had its fewest turns
COLD_BYTES = 64 << 20  # of weights that are read in turn: more than the last cache that most cores share
FEW_IMAGES = (1, 2, 4, 8)
# In the linears of a block, for each thread: five images of a base network. More at a time are not tried, as they would
# be no faster for each image, and linears are measured with no more than half of them, so that it takes no longer.
MOST_PRODUCTS = 7_500_000_000

ATTENTIONS: dict[str, Attend] = {
    "fused": kernels.attend,
    "blocked": kernels.attend_blocked,
    "blocked_bfloat16": kernels.attend_blocked_bfloat16,
}


@torch.no_grad()
def choose(model: Beit, dtype: Dtype, images_like: ImagesLike | None, clock: Clock = time.perf_counter) -> Choices:
    """Measure what is the fastest for the blocks of a model, where there is anything to choose from.

    Args:
        model: The plain network, with its weights.
        dtype: Of the inference copy.
        images_like: Batch, channels, height and width of the images to come; one of the model's size if None.
        clock: Gives seconds.
    """
    images_like = _checked(images_like or (1, model.config.in_chans, *model.config.img_size), model)
    choices = _plain(model, dtype, images_like)
    names = list(_linears(choices, model, dtype, "qkv"))
    if model.cls_token.device.type != "cpu":
        return choices
    trial = Trial(model, dtype, images_like, clock)
    packed = Choice("packed" if "packed" in names else names[0])
    choices = trial.cut(replace(choices, qkv=packed, proj=packed, fc1=packed, fc2=packed))
    choices = replace(choices, attention=trial.attention(choices))
    choices = replace(
        choices,
        qkv=trial.linear("qkv", choices),
        proj=trial.linear("proj", choices),
        fc1=trial.linear("fc1", choices),
        fc2=trial.linear("fc2", choices),
    )
    block = trial.block(choices)
    if block.taken == "chosen":
        return replace(choices, block=block)
    plain = _plain(model, dtype, images_like)
    return replace(plain, batch_parts=choices.batch_parts, images_at_a_time=choices.images_at_a_time)


def parts_of(choices: Choices, model: Beit, dtype: Dtype) -> Parts:
    """Return what the blocks of an inference copy are made of by these choices.

    Raises:
        ValueError: Something was chosen that cannot be had here.
    """
    _check_counts(choices)
    made: dict[str, MakeLinear] = {}
    for name in get_args(LinearName):
        linears = _linears(choices, model, dtype, name)
        taken = getattr(choices, name).taken
        if taken not in linears:
            raise InvalidValueError(
                f"Got choices with {name}={taken!r}; on this machine and with this PyTorch there are "
                f"{', '.join(linears)}. Leave them out to measure here."
            )
        made[name] = linears[taken]
    attentions = _attentions(dtype)
    if choices.attention.taken not in attentions:
        raise InvalidValueError(f"Got choices with attention={choices.attention.taken!r}; use {', '.join(attentions)}.")
    return Parts(**made, attend=attentions[choices.attention.taken], images_at_a_time=_images_at_a_time(choices))


def _check_counts(choices: Choices) -> None:
    parts, images = choices.batch_parts.taken, choices.images_at_a_time.taken
    if not (_is_count(parts) and choices.threads % int(parts) == 0):
        raise InvalidValueError(
            f"Got choices with batch_parts={parts!r}; use a number that divides their {choices.threads} threads."
        )
    if not (images == "all" or _is_count(images)):
        raise InvalidValueError(f"Got choices with images_at_a_time={images!r}; use 'all' or a number of images.")


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


class Trial:
    """What choices are tried on: blocks of a model, and tokens as they will come."""

    def __init__(self, model: Beit, dtype: Dtype, images_like: ImagesLike, clock: Clock) -> None:
        self.model, self.dtype, self.clock = model, dtype, clock
        self.batch = images_like[0]
        self.like = model.cls_token.detach().to(dtype if isinstance(dtype, torch.dtype) else model.cls_token.dtype)
        grid = inputs.grid_of(torch.empty(images_like, device="meta"), model.config)
        self.tokens = 1 + grid[0] * grid[1]
        self.bias: PositionBias = kernels.position_bias(grid, model.config, self.like, model.rel_pos_bias)
        self.generator = torch.Generator().manual_seed(0)

    def cut(self, choices: Choices) -> Choices:
        """Choose how a batch is cut: in parts for threads of their own or not, and in how many images at a time."""
        if self.batch == 1:
            return choices
        size = self.like.element_size() * sum(weight.numel() for weight in self.model.blocks[0].parameters())
        blocks = self._blocks(choices, 1 + math.ceil(COLD_BYTES / size))

        def run(candidates: Mapping[str, Choices], noise: float) -> Choice:
            calls: dict[str, list[Call]] = {}
            for place, (name, each) in enumerate(candidates.items()):
                x = self._random(_images_in_a_part(each), self.model.config.embed_dim)
                # Each call, of whichever candidate, gets the next block: none finds its weights in the cache.
                turns = [blocks[(place + turn * len(candidates)) % len(blocks)] for turn in range(len(blocks))]
                calls[name] = [_in_parts(each, partial(block, x, self.bias)) for block in turns]
            work = {name: _parts(each) * _images_in_a_part(each) for name, each in candidates.items()}
            return race(calls, self.clock, work, noise)

        cuts = {str(n): self._counts(replace(choices, batch_parts=Choice(str(n)))) for n in self._possible_parts()}
        parts = run({name: next(iter(counts.values())) for name, counts in cuts.items()}, noise=0.0)
        images = run(cuts[parts.taken], NOISE)
        return replace(choices, batch_parts=parts, images_at_a_time=images)

    def _possible_parts(self) -> list[int]:
        return sorted({1, math.gcd(torch.get_num_threads(), self.batch)})

    def _counts(self, choices: Choices) -> dict[str, Choices]:
        """Return choices with each count of images that a block may map together, the most first, by name."""
        images, most = self.batch // _parts(choices), self._most_images(choices)
        names = ["all"] if images <= most else []
        names += [str(n) for n in reversed(FEW_IMAGES) if n < images and n <= most]
        return {name: replace(choices, images_at_a_time=Choice(name)) for name in names}

    def _most_images(self, choices: Choices, products: int = MOST_PRODUCTS) -> int:
        weights = sum(weight.numel() for weight in self.model.blocks[0].parameters())
        return max(1, products * choices.threads // (_parts(choices) * self.tokens * weights))

    def _measured_images(self, choices: Choices) -> int:
        """Return with how many images of a part what lies inside a block is measured; the real number where few."""
        return min(_images_in_a_part(choices), self._most_images(choices, MOST_PRODUCTS // 2))

    def attention(self, choices: Choices) -> Choice:
        """Choose how values are mixed; each call gets other queries, keys and values, and another block's bias."""
        tables = [block.attn.relative_position_bias_table for block in self.model.blocks if isinstance(block, Block)]
        given_to = [self._attended(choices, table) for table in tables[: 2 * FEWEST_TURNS]]
        calls: dict[str, list[Call]] = {}
        for name, attend in _attentions(self.dtype).items():
            calls[name] = []
            for qkv, bias in given_to:
                returned = _returns(name) or qkv.dtype
                given = None if bias is None else bias.to(returned)
                calls[name].append(_in_parts(choices, partial(attend, qkv.to(returned), given)))
        return race(calls, self.clock)

    def _attended(self, choices: Choices, table: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values for one call, (3, B, H, N, D), and the bias of a block with this table."""
        config = self.model.config
        tokens = self._random(self._measured_images(choices), 3 * config.embed_dim)
        qkv = tokens.unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)  # from (B, N, 3, H, D)
        return qkv, self.bias.beside().of(table, qkv)

    def linear(self, name: LinearName, choices: Choices) -> Choice:
        """Choose the kind of one linear, with what a block does behind it."""
        kinds = _linears(choices, self.model, self.dtype, name)
        if name != "fc1":
            kinds.pop("packed_gelu_behind", None)
        weights = [_linear_of(block, name) for block in self.model.blocks]
        size = self.like.element_size() * weights[0].weight.numel() * len(kinds)
        weights = weights[: max(FEWEST_TURNS, math.ceil(COLD_BYTES / size))]
        x = self._random(self._measured_images(choices), weights[0].in_features)
        residual = self._random(self._measured_images(choices), weights[0].out_features)
        calls: dict[str, list[Call]] = {}
        for kind, make in kinds.items():
            made = [make(linear.weight.detach(), weights[0].bias) for linear in weights]
            calls[kind] = [_in_parts(choices, _use(name, linear, x, residual)) for linear in made]
        for call in calls.get("convolution", []):
            call()  # packs its weight
        return race(calls, self.clock)

    def block(self, choices: Choices) -> Choice:
        """Say whether a block that is made of all that was chosen is faster than the plain one.

        By however little: each part was clearly faster by itself.
        """
        plain = _plain(self.model, self.dtype, choices.images_like)
        x = self._random(self._measured_images(choices), self.model.config.embed_dim)
        candidates = {"plain": self._blocks(plain, 1), "chosen": self._blocks(choices, 1)}
        calls: dict[str, list[Call]] = {}
        for name, blocks in candidates.items():
            calls[name] = [_in_parts(choices, partial(block, x, self.bias)) for block in blocks]
        if "convolution" in _taken_linears(choices):
            calls["chosen"][0]()  # packs its weights
        return race(calls, self.clock, noise=0.0)

    def _blocks(self, choices: Choices, count: int) -> list[InferenceBlock]:
        parts = parts_of(choices, self.model, self.dtype)
        blocks = [copy.deepcopy(block) for block in self.model.blocks[:count] if isinstance(block, Block)]
        return [InferenceBlock(block, parts).to(self.like.dtype).eval() for block in blocks]

    def _random(self, images: int, channels: int) -> Tensor:
        return torch.randn(images, self.tokens, channels, generator=self.generator).to(self.like.dtype)


def race(
    candidates: Mapping[str, Sequence[Call]],
    clock: Clock,
    work: Mapping[str, int] | None = None,
    noise: float = NOISE,
) -> Choice:
    """Return the fastest candidate, the first one of those that are equal but for noise.

    Args:
        candidates: Of each, calls that do the same with one weight after the other. The plainest comes first.
        clock: Gives seconds.
        work: How much a call of each one does, where that is not the same.
        noise: Share by which times differ that are called equal.
    """
    times = dict.fromkeys(candidates, math.inf)
    start = clock()
    for turn in range(MOST_TURNS if len(candidates) > 1 else 0):
        enough = turn >= FEWEST_TURNS
        running = [name for name in candidates if not enough or times[name] <= LOSER * min(times.values())]
        if enough and (len(running) == 1 or clock() - start > SECONDS):
            break
        for name in running:
            call = candidates[name][turn % len(candidates[name])]
            times[name] = min(times[name], _seconds(call, clock) / (work[name] if work else 1))
    plain, shortest = next(iter(times.values())), min(times.values())
    taken = next(name for name, seconds in times.items() if seconds <= shortest * (1 + noise))
    return Choice(taken, round(plain / times[taken], 3) if len(candidates) > 1 else 1.0)


@dataclass(frozen=True)
class InParts:
    """A call that does the same in each part of a batch, at the same time."""

    call: Call
    parts: int
    threads: int  # of each

    def __call__(self) -> list[object]:
        """Return what each part returns."""
        return at_once([self.call] * self.parts, self.threads)


def _in_parts(choices: Choices, call: Call) -> Call:
    parts = _parts(choices)
    return call if parts == 1 else InParts(call, parts, choices.threads // parts)


def _seconds(call: Call, clock: Clock) -> float:
    """Return what a call takes; in parts, the mean, as in a forward pass they wait for each other only at the end."""
    if isinstance(call, InParts):
        return statistics.fmean(at_once([partial(_seconds, call.call, clock)] * call.parts, call.threads))
    begin = clock()
    call()
    return clock() - begin


def _plain(model: Beit, dtype: Dtype, images_like: ImagesLike) -> Choices:
    plain = Choice(next(iter(linears_for(model.cls_token, dtype))))
    return Choices(
        qkv=plain,
        proj=plain,
        fc1=plain,
        fc2=plain,
        attention=Choice("fused"),
        batch_parts=Choice("1"),
        images_at_a_time=Choice("all"),
        block=Choice("plain"),
        network=network_of(model.config),
        dtype=dtype_name(dtype),
        images_like=images_like,
        threads=torch.get_num_threads(),
        instructions=tuple(name for name in get_args(kernels.Instructions) if kernels.cpu_has(name)),
    )


def _linears(choices: Choices, model: Beit, dtype: Dtype, name: LinearName) -> dict[str, MakeLinear]:
    grid = inputs.grid_of(torch.empty(choices.images_like, device="meta"), model.config)
    tokens = _images_in_a_part(choices) * (1 + grid[0] * grid[1])
    returns = _returns(choices.attention.taken) if name == "qkv" else None
    return linears_for(model.cls_token, dtype, tokens, name == "fc2", returns)


def _attentions(dtype: Dtype) -> dict[str, Attend]:
    """Return all ways of attention; bfloat16 among 8 bits only, and where the processor has it."""
    halves = dtype == "int8" and has_bfloat16()
    return {name: attend for name, attend in ATTENTIONS.items() if halves or _returns(name) is None}


def _returns(attention: str) -> torch.dtype | None:
    """Return the dtype in which queries, keys and values are wanted, where that is not that of the tokens."""
    return torch.bfloat16 if attention == "blocked_bfloat16" else None


def _images_at_a_time(choices: Choices) -> int | None:
    taken = choices.images_at_a_time.taken
    return None if taken == "all" else int(taken)


def _parts(choices: Choices) -> int:
    return int(choices.batch_parts.taken)


def _images_in_a_part(choices: Choices) -> int:
    """Return how many images a block maps together in each part of a batch."""
    return _images_at_a_time(choices) or choices.images_like[0] // _parts(choices)


def _taken_linears(choices: Choices) -> set[str]:
    return {getattr(choices, name).taken for name in get_args(LinearName)}


def _linear_of(block: nn.Module, name: LinearName) -> nn.Linear:
    assert isinstance(block, Block)
    linear = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}[name]
    assert isinstance(linear, nn.Linear)
    return linear


def _use(name: LinearName, linear: InferenceLinear, x: Tensor, residual: Tensor) -> Call:
    if name == "qkv":
        return partial(linear, x)
    return partial(linear.gelu, x) if name == "fc1" else partial(linear.add, residual, x)


def _checked(images_like: ImagesLike, model: Beit) -> ImagesLike:
    sides = tuple(images_like)
    if len(sides) != 4 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InvalidValueError(f"Got images_like={images_like!r}; give (batch, channels, height, width).")
    inputs.fit(torch.empty(sides, device="meta"), model.config)
    batch, channels, height, width = sides
    return batch, channels, height, width
