"""The command pretrain."""

from beitzoo.cli import training

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def pretrain(recipe: training.RecipeName, out: training.OutFolder, settings: training.Settings = None) -> None:
    """Pretrain a network by masked image modelling, on images without labels.

    `beitzoo finetune` takes the folder as model.name. The same command goes on with a run that was interrupted.
    """
    training.require_extras()
    from beitzoo.training.recipe import load_recipe
    from beitzoo.training.tasks.pretrain import pretrain as train

    training.train_by(load_recipe(recipe, settings or (), kind="pretrain"), out, train)
