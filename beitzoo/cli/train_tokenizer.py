"""The command train-tokenizer."""

from beitzoo.cli import training

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def train_tokenizer(recipe: training.RecipeName, out: training.OutFolder, settings: training.Settings = None) -> None:
    """Train an image tokenizer (VQ-KD) from a teacher's features or from pixels, on images without labels.

    `beitzoo pretrain` takes the folder as task.tokenizer. The same command goes on with a run that was interrupted.
    """
    training.require_extras()
    from beitzoo.training.recipe import load_recipe
    from beitzoo.training.tasks.tokenizer import train_tokenizer as train

    training.train_by(load_recipe(recipe, settings or (), kind="tokenizer"), out, train)
