"""Rows of finished runs: a chain of a tokenizer, pretraining and fine-tuning, as it is on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import colour_recipe, write_colours

import beitzoo
from beitzoo.errors import UserError
from beitzoo.results import Row
from beitzoo.training.collect import COLUMNS, UnfinishedError, read_run, row_of, summarise, summarise_models
from beitzoo.training.recipe import Recipe, dump_recipe
from beitzoo.training.tasks.finetune import finetune

MODEL = "beit_nano_patch4_32.digits"


def write_run(folder: Path, recipe: dict[str, Any], log: str, **metrics: Any) -> Path:
    """Write what a run would leave."""
    train = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "seed": metrics["seed"]}
    whole = {"data": {"source": "digits"}, "train": train, **recipe}
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(dump_recipe(Recipe.model_validate(whole)))
    (folder / "metrics.json").write_text(json.dumps({"split_seed": 0, "updates": 10, "processes": 1, **metrics}))
    (folder / "log.csv").write_text(log)
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Runs that build on each other: tokenizer, pretraining, and two draws of fine-tuning."""
    lines = "line,loss,codes_used,perplexity\nupdates,5,,\nepoch,4,20,15.5\nepoch,3,,\n"
    task = {"kind": "tokenizer", "teacher": "pixels"}
    write_run(
        tmp_path / "tok", {"model": {"name": "vqkd_nano_patch4_32"}, "task": task}, lines, seed=3, train_seconds=7
    )
    lines = "line,loss,code_perplexity,images_per_sec\nupdates,,,10\nupdates,,,40\nupdates,,,30\nepoch,2.5,9.5,\n"
    task = {"kind": "pretrain", "tokenizer": str(tmp_path / "tok")}
    write_run(
        tmp_path / "mim",
        {"model": {"name": "beit_nano_patch4_32"}, "task": task},
        lines,
        seed=4,
        train_seconds=11.5,
        val_loss=2.25,
        val_token_accuracy=34.5678,
    )
    for seed, top1 in ((1, 90.0), (2, 92.0)):
        model = {"name": f"local-dir:{tmp_path / 'mim' / 'best'}", "pretrained": True}
        data = {"source": "digits", "train_per_class": 5, "label_seed": seed}
        write_run(
            tmp_path / f"fine-{seed}",
            {"model": model, "data": data},
            "line,loss\nepoch,0.5\n",
            seed=seed,
            train_seconds=2,
            train_images=50,
            test_top1=top1,
            val_top1=95.0,
            test_count=599,
            torch="2",
        )
    return tmp_path


def test_a_row_says_what_a_run_came_from_and_what_it_cost(chain: Path) -> None:
    row = row_of(read_run(chain / "fine-2"), "fine-2")
    assert tuple(row) == COLUMNS
    assert row.pop("settings") == row_of(read_run(chain / "fine-1"), "fine-1")["settings"]
    assert {name: value for name, value in row.items() if value is not None} == {
        "run": "fine-2",
        "task": "finetune",
        "model": "beit_nano_patch4_32",
        "start": "pretrain",
        "tokenizer": "vqkd_nano_patch4_32",
        "teacher": "pixels",
        "data": "digits",
        "train_per_class": 5,
        "train_images": 50,
        "trained": "all",
        "epochs": 2,
        "updates": 10,
        "batch_size": 8,
        "precision": "fp32",
        "seed": 2,
        "split_seed": 0,
        "label_seed": 2,
        "start_seed": 4,
        "tokenizer_seed": 3,
        "top1": 92.0,
        "count": 599,
        "val_top1": 95.0,
        "loss": 0.5,
        "train_seconds": 2,
        "earlier_seconds": 18.5,
        "processes": 1,
        "torch": "2",
    }


def test_pretraining_and_tokenizers_have_their_own_measures(chain: Path) -> None:
    mim, tokenizer = (row_of(read_run(chain / name), name) for name in ("mim", "tok"))
    assert (mim["start"], mim["tokenizer"], mim["teacher"], mim["earlier_seconds"]) == (
        "random",
        "vqkd_nano_patch4_32",
        "pixels",
        7.0,
    )
    assert (mim["loss"], mim["val_loss"], mim["token_accuracy"], mim["images_per_sec"]) == (2.5, 2.25, 34.5678, 30.0)
    assert mim["perplexity"] == 9.5
    assert (tokenizer["loss"], tokenizer["codes_used"], tokenizer["perplexity"]) == (3.0, 20.0, 15.5)
    assert (tokenizer["teacher"], tokenizer["tokenizer"], tokenizer["top1"]) == ("pixels", None, None)


def test_segmentation_is_measured_by_its_scores_and_a_baseline_says_what_it_is(tmp_path: Path) -> None:
    recipe = {"model": {"name": "beit_nano_patch4_32"}, "task": {"kind": "segment"}}
    scores = {"test_macc": 60.0, "test_aacc": 90.0, "val_miou": 51.0, "train_seconds": 1}
    for seed, miou in ((0, 50.0), (1, 52.0)):
        write_run(tmp_path / f"ours-{seed}", recipe, "line,loss\n", seed=seed, test_miou=miou, **scores)
    write_run(tmp_path / "unet", recipe, "line,loss\n", seed=0, test_miou=55.0, model="unet", **scores)
    rows = [row_of(read_run(tmp_path / name), name) for name in ("ours-0", "ours-1", "unet")]
    assert [row["model"] for row in rows] == ["beit_nano_patch4_32"] * 2 + ["unet"]
    assert [rows[0][name] for name in ("miou", "macc", "aacc", "val_miou", "top1")] == [50.0, 60.0, 90.0, 51.0, None]
    ours, unet = summarise(rows)
    assert ours.endswith("miou 51.00 ± 1.41 (n=2)")
    assert unet.endswith("miou 55.00 (n=1)")


def test_a_start_that_is_no_run_is_called_by_its_name(chain: Path) -> None:
    model = {"name": "beit_nano_patch4_32.digits", "pretrained": True}
    folder = write_run(chain / "other", {"model": model}, "line,loss\n", seed=0, train_seconds=1)
    row = row_of(read_run(folder), "other")
    assert (row["start"], row["model"], row["earlier_seconds"], row["loss"]) == (model["name"], model["name"], 0, None)
    task = {"kind": "pretrain", "tokenizer": "random_patch4_32"}
    folder = write_run(
        chain / "control", {"model": {"name": "m"}, "task": task}, "line,loss\n", seed=0, train_seconds=1
    )
    row = row_of(read_run(folder), "control")
    assert (row["tokenizer"], row["teacher"], row["tokenizer_seed"]) == ("random_patch4_32", None, None)


def test_the_network_of_a_run_without_its_weights_has_its_name(chain: Path) -> None:
    model = {"name": str(chain / "mim"), "pretrained": False}
    folder = write_run(chain / "scratch", {"model": model}, "line,loss\n", seed=0, train_seconds=1)
    row = row_of(read_run(folder), "scratch")
    assert (row["model"], row["start"], row["earlier_seconds"]) == ("beit_nano_patch4_32", "random", 0)


def test_runs_that_differ_in_seeds_only_are_summed_up(chain: Path) -> None:
    rows = [row_of(read_run(chain / name), name) for name in ("fine-1", "mim", "fine-2")]
    assert summarise(rows) == [
        "digits, 5 labels per class, 10 updates from pretrain (vqkd_nano_patch4_32): top1 91.00 ± 1.41 (n=2)"
    ]


def test_a_row_of_a_run_as_the_loop_leaves_it(tmp_path: Path) -> None:
    metrics = finetune(colour_recipe(write_colours(tmp_path / "data")), tmp_path / "run")
    row = row_of(read_run(tmp_path / "run"), "run")
    assert (row["start"], row["task"], row["data"], row["train_images"]) == ("random", "finetune", "data", 18)
    assert (row["top1"], row["count"]) == (round(metrics["test_top1"], 5), metrics["test_count"])
    assert (row["torch"], row["threads"]) == (torch.__version__, torch.get_num_threads())
    assert isinstance(row["images_per_sec"], float)


def test_what_is_no_finished_run_is_said(chain: Path) -> None:
    (chain / "fine-1" / "metrics.json").unlink()
    with pytest.raises(UnfinishedError, match=r"fine-1 is not finished: it has no metrics\.json"):
        read_run(chain / "fine-1")
    with pytest.raises(UnfinishedError, match=r"is no run: it has no recipe\.toml"):
        read_run(chain)
    (chain / "mim" / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="is not the recipe of a run"):
        read_run(chain / "mim")


def test_methods_are_told_apart_and_not_averaged(chain: Path) -> None:
    methods: dict[str, dict[str, Any]] = {
        "plain": {},
        "mixed": {"task": {"kind": "finetune", "mixup": 0.2}},
        "averaged": {"train": {"epochs": 2, "batch_size": 8, "lr": 1e-3, "ema_decay": 0.99}},
        "frozen": {"task": {"kind": "finetune", "freeze_blocks": "all"}},
        "adapted": {"task": {"kind": "finetune", "freeze_blocks": 2, "lora": {"rank": 4}}},
        "faster": {"train": {"epochs": 2, "batch_size": 8, "lr": 2e-3}},
    }
    rows = []
    for name, method in methods.items():
        for seed in (0, 1):
            recipe = {"model": {"name": "beit_nano_patch4_32"}, "run": {"workers": seed}, **method}
            recipe["train"] = {"epochs": 2, "batch_size": 8, "lr": 1e-3, **recipe.get("train", {}), "seed": seed}
            folder = write_run(
                chain / f"{name}-{seed}", recipe, "line,loss\n", seed=seed, train_seconds=1, test_top1=50.0
            )
            rows.append(row_of(read_run(folder), name))
    shown = {row["run"]: [row[name] for name in ("trained", "mixup", "ema_decay")] for row in rows}
    assert shown == {
        "plain": ["all", None, None],
        "mixed": ["all", 0.2, None],
        "averaged": ["all", None, 0.99],
        "frozen": ["head", None, None],
        "adapted": ["from block 2, LoRA of rank 4", None, None],
        "faster": ["all", None, None],
    }
    start = "digits, all labels, 10 updates from random"
    assert summarise(rows) == [
        f"{start}: top1 50.00 ± 0.00 (n=2)",
        f"{start}, mixup 0.2: top1 50.00 ± 0.00 (n=2)",
        f"{start}, ema_decay 0.99: top1 50.00 ± 0.00 (n=2)",
        f"{start}, head trained: top1 50.00 ± 0.00 (n=2)",
        f"{start}, from block 2, LoRA of rank 4 trained: top1 50.00 ± 0.00 (n=2)",
        f"{start}: top1 50.00 ± 0.00 (n=2)",
    ]


def test_models_that_were_measured_are_averaged_over_the_seeds_of_one_experiment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks, methods and precisions are told apart, and so are the best and the last weights of a run."""
    network = beitzoo.create_model("test_beit", num_classes=2)
    runs: dict[str, dict[str, Any]] = {
        "plain-0": {},
        "plain-1": {},
        "larger-0": {"model": {"name": "beit_nano_patch4_32"}},
        "mixed-0": {"task": {"kind": "finetune", "mixup": 0.2}},
    }
    for seed, (name, differs) in enumerate(runs.items()):
        recipe = {"model": {"name": "test_beit"}, **differs}
        folder = write_run(tmp_path / name, recipe, "line,loss\n", seed=seed, train_seconds=1)
        for part in ("best", "last"):
            beitzoo.save_pretrained(network, folder / part)
    beitzoo.save_pretrained(network, tmp_path / "mine")

    def line(*models: str) -> list[str]:
        rows: list[Row] = [{"model": f"{tmp_path}/{name}", "top1": str(97.0 + n)} for n, name in enumerate(models)]
        return summarise_models([*rows, {"model": MODEL, "top1": 50.0}, {"model": "gone", "error": "why"}], "top1")

    asked = "digits, all labels, 10 updates from random"
    spread = f"top1 97.50 ± 0.71 (mean ± sd of 2 runs that differ in seeds only: {asked})"
    assert line("plain-0", "plain-1/best", "larger-0", "mixed-0", "mine") == [spread]
    assert line("plain-0/last", "plain-1/best", "larger-0/best") == line("plain-0", "plain-0/best") == []
    two = [{"model": str(tmp_path / f"plain-{n}"), "top1": 97.0, "dtype": dtype} for n, dtype in enumerate("ab")]
    assert summarise_models(two, "top1") == []
    monkeypatch.chdir(tmp_path / "plain-0")  # where the name of a checkpoint is no part of the run
    assert summarise_models([{"model": MODEL, "top1": 50.0}, {"model": "../plain-1", "top1": 9.0}], "top1") == []


def test_a_row_says_in_which_fields_a_network_differs_from_its_architecture(chain: Path) -> None:
    model = {"name": "beit_nano_patch4_32", "overrides": {"patch_size": 8, "in_chans": 3}}
    folder = write_run(chain / "coarse", {"model": model}, "line,loss\n", seed=0, train_seconds=1)
    assert row_of(read_run(folder), "coarse")["overrides"] == "in_chans=3 patch_size=8"
    model = {"name": str(folder), "pretrained": True, "overrides": {"img_size": 48}}
    folder = write_run(chain / "larger", {"model": model}, "line,loss\n", seed=0, train_seconds=1)
    assert row_of(read_run(folder), "larger")["overrides"] == "img_size=48 in_chans=3 patch_size=8"


def test_runs_of_several_labels_have_mean_average_precision(tmp_path: Path) -> None:
    recipe = {"model": {"name": "beit_nano_patch4_32"}, "task": {"kind": "finetune", "labels": "many"}}
    for seed, precision in ((0, 60.0), (1, 62.0)):
        scores = {"train_seconds": 1, "test_map": precision, "val_map": 58.5}
        write_run(tmp_path / f"run-{seed}", recipe, "line,loss\n", seed=seed, **scores)
    rows = [row_of(read_run(tmp_path / f"run-{seed}"), f"run-{seed}") for seed in (0, 1)]
    assert [(row["map"], row["val_map"], row["top1"]) for row in rows] == [(60.0, 58.5, None), (62.0, 58.5, None)]
    assert summarise(rows) == ["digits, all labels, 10 updates from random: map 61.00 ± 1.41 (n=2)"]
