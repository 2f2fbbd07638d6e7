"""Classes have colours: the published ones of ADE20K, and others that are easily told apart."""

import itertools
import math

import pytest

from beitzoo.errors import InvalidValueError
from beitzoo.zoo.checkpoints import Classify, Segment
from beitzoo.zoo.colours import class_colours
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import SegmenterConfig

ADE20K = Segment(labels="ade20k")


def test_ade20k_has_its_published_palette() -> None:
    colours = class_colours(ADE20K, 150)
    assert colours[:3] == [(120, 120, 120), (180, 120, 120), (6, 230, 230)]  # wall, building, sky
    assert (colours[12], colours[149]) == ((150, 5, 61), (92, 0, 255))  # person, flag
    assert (len(colours), len(set(colours))) == (150, 149)
    assert colours[6] == colours[48] == (140, 140, 140)  # road and skyscraper, as published
    names = label_names(ADE20K)
    assert names is not None
    assert class_colours(names, 150) == class_colours([f"{name} " for name in names], 150) == colours


@pytest.mark.parametrize(
    "classes", [None, ("a", "b", "c"), Segment(labels=("a", "b", "c")), Classify(labels="digits"), ADE20K], ids=str
)
def test_others_have_the_first_colours_of_one_sequence(classes: Segment | tuple[str, ...] | None) -> None:
    assert class_colours(classes, 3) == class_colours(None, 255)[:3] == [(73, 36, 255), (255, 0, 0), (0, 182, 0)]


def test_colours_are_easily_told_apart() -> None:
    colours = class_colours(None, 255)
    assert len(set(colours)) == 255
    for count, distance in ((11, 100), (21, 60), (255, 30)):
        assert min(itertools.starmap(math.dist, itertools.combinations(colours[:count], 2))) > distance
    assert min(map(max, colours)) > 127 and max(map(sum, colours)) < 3 * 255
    assert class_colours(None, 0) == []


def test_a_label_map_has_no_room_for_more() -> None:
    with pytest.raises(InvalidValueError, match="Got 256 classes; there are colours for up to 255"):
        class_colours(Segment(network=SegmenterConfig(num_classes=256)), 256)
