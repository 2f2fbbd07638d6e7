"""The first probe of a plan: what a linear classifier on frozen features reaches, in seconds."""

import random

from beitzoo.errors import UserError
from beitzoo.evaluation.probe import Probing, probe_blocks
from beitzoo.factory import create_model
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.inference.fastest import COPY, computed_by, for_many_images
from beitzoo.inference.pipeline import Loading
from beitzoo.models.beit import Beit
from beitzoo.training.processes import Processes
from beitzoo.training.sections import ModelSection

# Images that it looks at, to fit and to measure.
_PROBED = (400, 200)


def first_probe(section: ModelSection, images: ImageSet, split: Split) -> str:
    """Say what a linear probe on frozen features reaches on some of the images: what there is to gain above that.

    It is fitted on some of the images to train on, and measured on some of those to choose by, which choose its block
    too: of what is held out nothing is used.
    """
    if not section.pretrained:
        return "No probe: the weights start random, so their features say nothing yet."
    if images.label_sets is not None:
        return "No probe: probes tell one class of each image, and these have any number of labels."
    network: object = create_model(section.name, True, checkpoint_path=section.checkpoint, num_classes=0)
    assert isinstance(network, Beit)
    network.to(Processes.join().device)
    draw = random.Random(0)
    train, val = (
        sorted(draw.sample(part, min(len(part), most)))
        for part, most in zip((split.train, split.val), _PROBED, strict=True)
    )
    depth = network.config.depth
    blocks = sorted({depth // 2 - 1, depth * 2 // 3 - 1, depth * 5 // 6 - 1, depth - 1} & set(range(depth)))
    probing = Probing(blocks, ("mean",), loading=Loading(), probes=("linear",))
    network = for_many_images(network, len(train) + len(val), probing.loading.batch_size, inplace=True)
    by_copy = " The optimized copy computed the features, the same to rounding." * (computed_by(network) == COPY)
    try:
        best = probe_blocks(network, images, Split(train, [], val), probing).best("linear")
    except UserError as error:
        return f"No probe: {error}"
    return (
        f"A linear probe on frozen features, fitted on {len(train):,} of the images, is right on {best.top1:.1f}% of "
        f"{len(val):,} others (block {best.block}). Fine-tuning pays as far as it is better than that.{by_copy}"
    )
