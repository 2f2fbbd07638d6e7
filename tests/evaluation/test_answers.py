"""What a classifier answered, against slow obvious counts; the sheet of its mistakes shows the right images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.answers import (
    Answers,
    class_rows,
    read_class_names,
    read_confusion,
    write_answers,
    write_class_rows,
)
from beitzoo.evaluation.mistakes import draw_mistakes, write_mistakes
from beitzoo.images.image_set import ImageSet

NAMES = ("cat, tabby", "dog", "newt", "owl")


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and logits of 40 images; none is an owl."""
    return torch.randint(0, 3, (40,)), torch.randn(40, 4)


def test_answers_are_counted_as_by_hand(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels, logits = drawn
    halves = [Answers.of(range(20 * h, 20 * h + 20), *(part[20 * h :][:20] for part in drawn)) for h in (1, 0)]
    answers = Answers.joined(halves)
    assert answers.images.tolist() == list(range(40))
    pairs = [(int(label), int(row.argmax())) for label, row in zip(labels, logits, strict=True)]
    expected = [[pairs.count((truth, given)) for given in range(4)] for truth in range(4)]
    assert answers.confusion(4).tolist() == expected
    assert answers.probabilities[3].item() == pytest.approx(1 / np.exp((logits[3] - logits[3].max()).numpy()).sum())
    for label, row in enumerate(class_rows(answers, NAMES)):
        images, right = sum(expected[label]), expected[label][label]
        assert (row["class"], row["images"], row["right"]) == (NAMES[label], images, right)
        wrong = [0 if given == label else times for given, times in enumerate(expected[label])]
        assert row["mistaken_images"] == max(wrong)
        assert row["mistaken_for"] == (NAMES[wrong.index(max(wrong))] if max(wrong) else None)
        assert row["top1"] == (pytest.approx(100 * right / images, abs=1e-3) if images else None)


def test_what_is_written_is_read(drawn: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    labels, logits = drawn
    images = ImageSet([Image.new("L", (2, 2))] * 40, labels.tolist(), NAMES)
    answers = Answers.of(range(40), labels, logits)
    write_answers(tmp_path / "answers.csv", answers, images)
    write_class_rows(tmp_path / "per_class.csv", answers, NAMES)
    assert tuple(read_class_names(tmp_path / "per_class.csv")) == NAMES
    assert np.array_equal(read_confusion(tmp_path / "answers.csv", 4), answers.confusion(4))
    with pytest.raises(InvalidValueError, match="is none of its classes"):
        read_confusion(tmp_path / "answers.csv", 2)
    with pytest.raises(InvalidValueError, match="does not have the columns image"):
        read_confusion(tmp_path / "per_class.csv", 4)


def test_the_most_confident_mistakes_come_first() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0], [float("nan"), 0.0], [5.0, 0.0]])
    answers = Answers.of([7, 8, 9, 10, 11], torch.tensor([0, 0, 0, 1, 1]), logits)
    assert answers.mistakes(10) == [4, 1, 2, 3]
    assert answers.mistakes(2) == [4, 1]


def test_the_sheet_shows_each_mistake_once_in_its_place(tmp_path: Path) -> None:
    """By the colours of the images; the right answer, of the last image, is not shown."""
    colours = [(200, 10 * number, 60) for number in range(9)]
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (300, 200), colour).save(path)
    paths[1].unlink()
    images = ImageSet(paths, [0] * 9, NAMES, tmp_path)
    logits = torch.tensor([[0.0, 9.0 - number] for number in range(8)] + [[1.0, 0.0]])
    answers = Answers.of(range(9), torch.zeros(9, dtype=torch.int64), logits)
    write_mistakes(tmp_path / "sheet.png", answers, images)
    with Image.open(tmp_path / "sheet.png") as sheet:
        size = sheet.size
        places = {colour: np.argwhere((np.asarray(sheet) == colour).all(-1)) for colour in colours}
    assert [len(place) > 20_000 for place in places.values()] == [True, False, *[True] * 6, False]
    top, left = (np.array([places[colours[n]].min(0)[axis] for n in (0, 2, 5, 6, 7)]) for axis in (0, 1))
    assert top[0] == top[1] == top[2] < top[3] == top[4]
    assert left[0] == left[3] < left[4] < left[1] < left[2]
    assert size == (6 * 184 + 5 * 16 + 32, sheet_height(answers, images))


def sheet_height(answers: Answers, images: ImageSet) -> int:
    return draw_mistakes(answers, images).height


def test_a_sheet_without_mistakes_says_so() -> None:
    answers = Answers.of([0], torch.tensor([1]), torch.tensor([[0.0, 1.0]]))
    sheet = draw_mistakes(answers, ImageSet([Image.new("L", (2, 2))], [1], NAMES))
    assert sheet.height < 60
    assert np.asarray(sheet).min() < 60
