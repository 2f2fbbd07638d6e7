"""The U-Net that segmentation models are compared with goes through the same task."""

import json
from pathlib import Path

import torch
from baselines.unet import Unet, UnetSegmenter, main, prepare_unet
from squares import CLASSES, squares_recipe, write_squares

from beitzoo.training.processes import Processes
from beitzoo.training.tasks.segment import prepare


def test_it_is_trained_for_some_seconds_and_measured_as_a_segmentation_model(tmp_path: Path) -> None:
    write_squares(tmp_path / "data")
    recipe = tmp_path / "squares.toml"
    recipe.write_text(
        '[model]\nname = "test_beit"\noverrides = { embed_dim = 32, img_size = 48 }\n[data]\nsource = "annotations"\n'
        f'path = "{tmp_path / "data"}"\n[train]\nupdates = 100\nbatch_size = 2\nlr = 1e-3\n'
        '[task]\nkind = "segment"\nlabels = { ignore = [3] }\n'
    )
    main([str(recipe), str(tmp_path / "run"), "--seconds", "0.1", "--set", "run.tensorboard=false"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 1 <= metrics["updates"] < 100
    assert 0 <= metrics["test_miou"] <= 100
    assert {f"test_iou_{name}" for name in CLASSES} <= metrics.keys()


def test_only_the_unet_is_trained_and_on_the_same_batches(tmp_path: Path) -> None:
    recipe = squares_recipe(write_squares(tmp_path))
    alone = Processes(0, 1, torch.device("cpu"))
    task, model = prepare_unet(recipe, alone)
    assert isinstance(model, UnetSegmenter)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"unet.{name}" for name, _ in Unet(3, 3).named_parameters()
    }
    assert model(torch.zeros(2, 3, 48, 40)).shape == (2, 3, 48, 40)
    ours, theirs = next(task.batches(0)), next(prepare(recipe, alone)[0].batches(0))
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.masks, theirs.masks)
