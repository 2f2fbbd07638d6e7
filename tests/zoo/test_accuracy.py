"""Published accuracies are complete, of known checkpoints, and what they say fits together."""

from beitzoo.zoo.accuracy import DATA_SETS, Accuracy, headline, published
from beitzoo.zoo.pretrained import PRETRAINED


def test_every_figure_is_of_a_checkpoint_and_has_a_source() -> None:
    rows = published()
    assert len(rows) == 9 * 8 + 14 + 8 + 1
    for row in rows:
        assert row.model in PRETRAINED
        assert row.data in DATA_SETS
        assert row.source
        assert row.img_size == PRETRAINED[row.model].data.input_size[2]
        scores = [getattr(row, name) for name in ("top1", "top5", "miou", "macc", "aacc")]
        assert all(0 < score <= 100 for score in scores if score is not None)
        assert (row.miou is None) != (row.top1 is None)
        assert row.top5 is None or row.top1 is None or row.top1 < row.top5
    assert len({(row.model, row.data, row.source, row.protocol) for row in rows}) == len(rows)


def test_the_sources_agree_within_what_a_crop_changes() -> None:
    """timm and the authors cropped differently; a slip of the pen would be larger."""
    by_model: dict[tuple[str, str], list[Accuracy]] = {}
    for row in published():
        if row.top1 is not None:
            by_model.setdefault((row.model, row.data), []).append(row)
    twice = [rows for rows in by_model.values() if len(rows) == 2]
    assert len(twice) == 10
    for first, second in twice:
        assert first.top1 is not None and second.top1 is not None
        assert abs(first.top1 - second.top1) <= 0.51


def test_the_headline_is_on_the_set_a_checkpoint_was_made_for() -> None:
    best = headline("beitv2_large_patch16_224.in1k_ft_in22k_in1k")
    assert best is not None
    assert (best.data, best.top1, best.source[:4]) == ("imagenet", 88.406, "timm")
    segmentation = headline("beit_base_patch16_640.in22k_ft_in22k_ade20k")
    assert segmentation is not None
    assert (segmentation.miou, segmentation.protocol) == (53.61, "single scale")
    assert headline("beit_base_patch16_224.mim_in22k") is None
    assert headline("beit_base_patch16_224.in22k_ft_in22k") is None


def test_timm_cropped_as_the_checkpoints_transform_says() -> None:
    for row in published():
        if row.source.startswith("timm"):
            data = PRETRAINED[row.model].data
            assert (row.crop_pct, row.interpolation) == (data.crop_pct, data.interpolation)
