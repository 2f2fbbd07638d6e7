"""Adapters are those of the paper, train like any network, and are gone from what a run saves."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import colour_recipe, write_colours
from commands import run as command
from oracles import reference_logits, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import beitzoo
from beitzoo.errors import InvalidOptionError, InvalidValueError, UnsupportedError
from beitzoo.models.beit import Beit
from beitzoo.training import loop
from beitzoo.training.loop import Run, fit
from beitzoo.training.lora import add_adapters, describe_adapters, merged
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from beitzoo.training.sections import Finetune, Lora
from beitzoo.training.signals import Interrupted
from beitzoo.training.state import start_state
from beitzoo.training.tasks.finetune import FinetuneTask, _freeze, finetune, prepare

ALONE = Processes(0, 1, torch.device("cpu"))
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
PLACES = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "colours", per_class=6)


def lora_recipe(data: Path, lora: dict[str, Any] | None = None, **train: Any) -> Recipe:
    recipe = colour_recipe(data, {"log_updates": 1, "tensorboard": False}, **{"epochs": 2, **train})
    task = {**recipe.task.model_dump(), "lora": {"rank": 3, "alpha": 6, **(lora or {})}}
    return Recipe.model_validate({**recipe.model_dump(), "task": task})


def drawn(model: Beit, std: float = 0.2) -> Beit:
    """Let every parameter differ from every other, adapters too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    return model


def by_hand(model: Beit, scale: float) -> dict[str, Tensor]:
    """Return the plain network's tensors, W + scale B A where there is an adapter."""
    state = model.state_dict()
    plain = {}
    for name, tensor in state.items():
        place = name.removesuffix(".base_layer.weight")
        if place != name:
            tensor = tensor + scale * state[f"{place}.lora_B.default.weight"] @ state[f"{place}.lora_A.default.weight"]
        if ".lora_" not in name:
            plain[name.replace(".base_layer", "")] = tensor
    return plain


@pytest.mark.parametrize("tables", [{}, SHARED], ids=["own", "shared"])
def test_adapters_are_those_of_the_paper(tables: dict[str, bool]) -> None:
    """With the biases of queries and values, which the plain network adds inside the product; against plain loops."""
    torch.manual_seed(1)
    model = beitzoo.create_model("test_beit", num_classes=3, depth=2, **tables).eval()
    images = torch.randn(1, 3, *model.config.img_size)
    before = model(images)
    add_adapters(model, Lora(rank=3, alpha=6))
    assert torch.equal(model(images), before)
    model = drawn(model).double()
    state = by_hand(model, scale=2)
    logits = model(images.double())
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    expected = torch.from_numpy(reference_logits(arrays, model.config, images[0].double().numpy()))
    assert relative_error(logits[0], expected) < 1e-10

    plain = merged(model)
    assert relative_error(plain(images.double()), logits) < 1e-10
    assert plain.state_dict().keys() == beitzoo.create_model("test_beit", **tables).state_dict().keys()
    torch.testing.assert_close(plain.state_dict(), state, rtol=0, atol=1e-12)
    assert torch.equal(model(images.double()), logits)  # as it was
    assert relative_error(merged(model.float())(images), model(images)) < 1e-5
    for name in ("attn.q_bias", "attn.v_bias", "gamma_1"):
        with torch.no_grad():
            model.get_parameter(f"blocks.1.{name}").zero_()
        assert relative_error(model(images), logits.float()) > 1e-3


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("tables", [{}, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("besides", ["none", "all"])
def test_what_is_trained(frozen: int, tables: dict[str, bool], besides: str) -> None:
    """Adapters of blocks that are not frozen, the last norm and the head; stem and matrices never are."""
    model = beitzoo.create_model("test_beit", **tables)
    plain = set(model.state_dict())
    recipe = {"freeze_blocks": frozen or None, "lora": {"targets": ["qkv", "fc2"], "besides": besides}}
    _freeze_as(model, recipe)
    blocks = range(frozen, model.config.depth)
    expected = {
        f"blocks.{i}.{place}.lora_{m}.default.weight" for i in blocks for place in ("attn.qkv", "mlp.fc2") for m in "AB"
    }
    expected |= {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    if besides == "all":
        matrices = {f"blocks.{i}.{place}.weight" for i in blocks for place in PLACES}
        own = {name for name in plain if name.startswith(tuple(f"blocks.{i}." for i in blocks))}
        shared = {"rel_pos_bias.relative_position_bias_table"} & plain if not frozen else set()
        expected |= {name.replace("fc2.", "fc2.base_layer.") for name in own - matrices} | shared
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


def _freeze_as(model: Beit, task: dict[str, Any]) -> None:
    _freeze(model, Finetune.model_validate(task))


@pytest.mark.parametrize(
    ("section", "frozen", "message"),
    [
        ({}, 2, r"freezes all 2 blocks, so that task.lora has none to adapt; give fewer"),
        ({"rank": 65}, 0, r"task.lora.rank is 65, but the matrices have 64"),
    ],
)
def test_what_cannot_be_adapted_is_told(section: dict[str, Any], frozen: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        add_adapters(beitzoo.create_model("test_beit"), Lora(**section), frozen)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"targets": []}, {"targets": ["query"]}, {"bias": "all"}])
def test_a_section_is_closed(colours: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lora_recipe(colours, wrong)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"task.lora needs peft; install it with: pip install 'beitzoo\[lora\]'"):
        add_adapters(beitzoo.create_model("test_beit"), Lora())


def adamw(parameters: dict[str, Tensor], gradients: list[dict[str, Tensor]], rates: list[float]) -> dict[str, Tensor]:
    """AdamW by its paper, no matter what PyTorch has of it; matrices decay by 0.05."""
    result = {}
    for name, value in parameters.items():
        first = second = torch.zeros_like(value)
        for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            decay = 0.05 if value.ndim > 1 else 0.0
            first = 0.9 * first + 0.1 * gradient[name]
            second = 0.999 * second + 0.001 * gradient[name] ** 2
            step_size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            value = value * (1 - rate * decay) - rate * step_size
        result[name] = value
    return result


def test_an_update_is_that_of_plain_arithmetic(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update in two parts, in double precision: its gradients are those of W + (alpha / rank) B A."""
    recipe = lora_recipe(
        colours, updates=1, epochs=None, warmup_epochs=0, accumulation=2, clip_grad=0, ema_decay=0.75, lr=1e-2
    )
    task, model = prepare(recipe, ALONE)
    monkeypatch.setattr(FinetuneTask, "_on_device", lambda _, batch: (batch.images.double(), batch.labels))
    for block in model.blocks:
        block.drop_path.rate = 0.0
    drawn(model.double())
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: start[name].clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2 + 4
    plain = beitzoo.create_model("test_beit", num_classes=3).double()
    batches = [batch for batch, _ in zip(task.batches(0), range(2), strict=False)]
    count = sum(len(batch.labels) for batch in batches)
    for batch in batches:
        state = {}
        for name in plain.state_dict():
            place = name.removesuffix(".weight")
            if name in trained:
                state[name] = trained[name]
            elif f"{place}.lora_A.default.weight" in trained:
                a, b = (trained[f"{place}.lora_{matrix}.default.weight"] for matrix in "AB")
                state[name] = start[f"{place}.base_layer.weight"] + 6 / 3 * b @ a
            else:
                state[name] = start.get(name, start.get(f"{place.rpartition('.')[0]}"))
                if state[name] is None:
                    state[name] = start[name.replace(".bias", ".base_layer.bias")]
        logits = functional_call(plain, state, (batch.images.double(),))
        (F.cross_entropy(logits, batch.labels, reduction="sum") / count).backward()
    gradients = {name: parameter.grad for name, parameter in trained.items()}
    expected = adamw({name: p.detach() for name, p in trained.items()}, [gradients], [1e-2])

    state = start_state(task, model, recipe.train, ALONE)
    fit(task, state, Run(tmp_path, recipe.train, recipe.run, ALONE))
    for name, tensor in state.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.get(name, start[name]), rtol=0, atol=1e-10, msg=name)
        mean = 0.75 * start[name] + 0.25 * tensor
        torch.testing.assert_close(state.evaluated.state_dict()[name], mean, rtol=0, atol=1e-12, msg=name)
    best = beitzoo.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True, dtype=torch.float64)
    torch.testing.assert_close(best.state_dict(), by_hand(state.evaluated, scale=2), rtol=0, atol=1e-12)


def outcome(out: Path) -> dict[str, Any]:
    with (out / "log.csv").open() as file:
        losses = [line["loss"] for line in csv.DictReader(file)]
    return {"losses": losses, **{name: (out / name / "model.safetensors").read_bytes() for name in ("best", "last")}}


EVERYTHING = {"ema_decay": 0.5, "accumulation": 2, "precision": "bf16", "epochs": 3, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def whole(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a run may have."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finetune(lora_recipe(colours, {"dropout": 0.2, "besides": "all"}, **EVERYTHING), out)
    return out


def test_going_on_ends_the_same(whole: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with dropout, stochastic depth, a moving average, parts and bfloat16."""
    recipe = lora_recipe(colours, {"dropout": 0.2, "besides": "all"}, **EVERYTHING)
    numbers = iter([2, 0, 0])
    monkeypatch.setattr(loop._Fit, "_stop_number", lambda self, agreed: next(numbers))
    with pytest.raises(Interrupted, match="after 1 of 3 updates"):
        finetune(recipe, tmp_path)
    finetune(recipe, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_checkpointing_changes_not_a_bit(whole: Path, colours: Path, tmp_path: Path) -> None:
    recipe = lora_recipe(colours, {"dropout": 0.2, "besides": "all"}, **EVERYTHING, grad_checkpointing=True)
    finetune(recipe, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_a_run_leaves_plain_checkpoints(whole: Path) -> None:
    """That load strictly, run on the optimized copy, and can be trained on with adapters again."""
    model = beitzoo.create_model(f"local-dir:{whole / 'best'}", pretrained=True).eval()
    assert model.class_names == ("blue", "green", "red")
    images = torch.randn(2, 3, *model.config.img_size)
    assert relative_error(beitzoo.optimize(model)(images), model(images)) < 1e-5


def test_what_is_trained_is_printed(colours: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(lora_recipe(colours, epochs=1)))
    tried = command("finetune", str(file), "--out", str(tmp_path / "out"), "--dry-run")
    assert (tried.exit_code, tried.stderr) == (0, ""), tried.stderr
    result = command("finetune", str(file), "--out", str(tmp_path / "out"), "--set", "task.freeze_blocks=1")
    assert result.exit_code == 0, result.stderr
    # Of the second block 3 (64 + 192) + 3 (64 + 64) + 2 x 3 (64 + 256), of norm and head 2 x 64 + 65 x 3.
    model = beitzoo.create_model("test_beit", num_classes=3)
    total = sum(parameter.numel() for parameter in model.parameters()) + 3072
    assert f"Trains {3072 + 323:,} of {total:,} parameters." in result.stderr
    assert "LoRA of rank 3, scaled by 2, on qkv, proj, fc1, fc2 of 1 of 2 blocks" in result.stderr
    assert "Frozen weights start random and stay so" in result.stderr


def test_a_layer_decay_of_whole_networks_is_told() -> None:
    model, section = beitzoo.create_model("test_beit"), Lora(rank=3)
    add_adapters(model, section)
    what, slow = describe_adapters(model, section, 0.7)
    assert slow.startswith(
        "train.layer_decay: adapters of the first block learn at 0.49 of train.lr, as in recipes for"
    )
    assert describe_adapters(model, section, 1.0) == [what]


def test_adapters_of_a_user_are_merged_and_saved(tmp_path: Path) -> None:
    """Of `get_peft_model`; bare parameters that were trained are saved with the rest, and are not by peft."""
    model = drawn(beitzoo.create_model("test_beit", num_classes=3)).eval()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, *model.config.img_size)
    config = LoraConfig(r=3, target_modules=["qkv", "attn.proj", "fc1", "fc2"], modules_to_save=["head", "fc_norm"])
    adapted = get_peft_model(model, config).eval()
    bare = adapted.base_model.model.blocks[1].attn.q_bias
    drawn(adapted, std=0.1)
    logits = adapted(images)
    for save in (beitzoo.save_pretrained, beitzoo.optimize):
        with pytest.raises((InvalidOptionError, InvalidValueError), match=r"[Mm]erge (its )?adapters"):
            save(adapted, *([tmp_path / "no"] if save is beitzoo.save_pretrained else []))

    adapted.save_pretrained(tmp_path / "peft")
    fresh = beitzoo.create_model("test_beit", num_classes=3)
    fresh.load_state_dict(start)
    read = PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    assert torch.equal(read.base_model.model.head.weight, adapted.base_model.model.head.weight)
    assert not torch.equal(read.base_model.model.blocks[1].attn.q_bias, bare)
    assert relative_error(read(images), logits) > 1e-3

    beitzoo.save_pretrained(adapted.merge_and_unload(), tmp_path / "whole")
    whole = beitzoo.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    assert relative_error(whole(images), logits) < 1e-5
    assert torch.equal(whole.blocks[1].attn.q_bias, bare)


def test_the_recipe_builds_what_it_says() -> None:
    recipe = load_recipe("configs/finetune/lora.toml")
    model: Any = beitzoo.create_model(recipe.model.name, device="meta", num_classes=3, **recipe.model.overrides)
    _freeze_as(model, recipe.task.model_dump())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Of each block 16 (768 + 2304) + 16 (768 + 768) + 2 x 16 (768 + 3072), of the norm 2 x 768, of the head 3 x 769.
    assert learning == 12 * 196_608 + 2 * 768 + 3 * 769
