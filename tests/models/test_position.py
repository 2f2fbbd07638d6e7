"""Bias tables: what is looked up, and what a table becomes on another grid."""

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import gen_relative_position_index
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from beitzoo.models import position

GRIDS = [(14, 14), (1, 1), (1, 4), (3, 1), (2, 5), (7, 4)]


def look_up(table: torch.Tensor, grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return position.bias(table, position.relative_position_index(grid, table.device), dtype)


@pytest.mark.parametrize("grid", GRIDS)
def test_index_is_timms(grid: tuple[int, int]) -> None:
    ours = position.relative_position_index(grid, torch.device("cpu"))
    assert torch.equal(ours, gen_relative_position_index(grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_bias_is_the_table_read_through_the_index(grid: tuple[int, int]) -> None:
    table = torch.randn(position.table_rows(grid), 3)
    looked_up = table[gen_relative_position_index(grid)].permute(2, 0, 1)
    assert torch.equal(look_up(table, grid), looked_up)
    half = look_up(table, grid, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, looked_up.bfloat16())


def test_bias_first_made_under_inference_mode_can_be_trained_through() -> None:
    table = torch.randn(position.table_rows((2, 3)), 2, requires_grad=True)
    with torch.inference_mode():
        look_up(table, (2, 3))
    look_up(table, (2, 3)).sum().backward()
    assert table.grad is not None
    assert table.grad.sum() == 2 * 7 * 7


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 32), (14, 40), (4, 6), (3, 5), (2, 7), (24, 14), (2, 1)])
def test_axis_resize_is_the_spline_of_the_original(old: int, new: int) -> None:
    """unilm evaluates FITPACK's interpolating spline on its geometric grid; SciPy still has that code."""
    points = position._geometric_offsets(old - 1, new - 1).numpy()
    values = np.random.default_rng(0).normal(size=(len(points), len(points)))
    degree = min(3, len(points) - 1)
    at = np.arange(1 - new, new)
    expected = RectBivariateSpline(points, points, values, kx=degree, ky=degree, s=0)(at, at)
    table = torch.cat([torch.from_numpy(values).view(-1, 1), torch.tensor([[7.0], [8.0], [9.0]]).double()])
    resized = position.resize_table(table, (old, old), (new, new))
    np.testing.assert_allclose(resized[:-3, 0].view(len(at), -1), expected, atol=1e-12)
    assert resized[-3:, 0].tolist() == [7, 8, 9]


# Measured on the original code: ratio of the series for 14 patches a side to 24, 32, 40 and 16.
@pytest.mark.parametrize(("new", "ratio"), [(24, 1.090307), (32, 1.134918), (40, 1.168504), (16, 1.023493)])
def test_offsets_grow_by_the_originals_ratio(new: int, ratio: float) -> None:
    points = position._geometric_offsets(13, new - 1)
    assert points[15] - points[14] == pytest.approx(ratio, abs=2e-6)
    assert points[-1] == pytest.approx(new - 1, abs=2e-4)


def test_an_axis_that_keeps_its_size_keeps_its_values() -> None:
    table = torch.randn(position.table_rows((4, 6)), 2)
    assert position.resize_table(table, (4, 6), (4, 6)) is table
    taller = position.resize_table(table, (4, 6), (7, 6))
    centre_rows = taller[:-3].view(13, 11, 2)[5:8]
    torch.testing.assert_close(centre_rows, table[:-3].view(7, 11, 2)[2:5])


def test_single_row_grids_resize() -> None:
    table = torch.randn(position.table_rows((1, 3)), 2)
    resized = position.resize_table(table, (1, 3), (2, 3))
    middle = table[:-3]
    torch.testing.assert_close(resized[:-3], middle.repeat(3, 1))


def test_absolute_embeddings_resize_like_an_image_and_keep_the_class_token() -> None:
    embedding = torch.cat([torch.full((1, 1, 2), 5.0), torch.ones(1, 12, 2)], dim=1)
    resized = position.resize_pos_embed(embedding, (3, 4), (6, 5))
    assert resized.shape == (1, 31, 2)
    assert resized[0, 0].tolist() == [5, 5]
    torch.testing.assert_close(resized[0, 1:], torch.ones(30, 2))


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((4, 4), (6, 3)), ((3, 5), (5, 5)), ((6, 6), (4, 4))])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's interpolator
def test_linear_rule_is_timms(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(position.table_rows(old), 2)
    theirs = resize_rel_pos_bias_table(table, new, (position.table_rows(new), 2), old)
    torch.testing.assert_close(position.resize_table(table, old, new, "geometric_linear"), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4), (14, 24), (1, 3)])
def test_bilinear_rule_is_transformers(old: int, new: int) -> None:
    table = torch.randn(position.table_rows((old, old)), 3)
    config = BeitConfig(hidden_size=6, num_attention_heads=3, image_size=old * 16, use_relative_position_bias=True)
    module = BeitRelativePositionBias(config)
    with torch.no_grad():
        module.relative_position_bias_table.copy_(table)
    theirs = module((new, new)).reshape(3, 1 + new * new, 1 + new * new)
    fitted = position.resize_table(table, (old, old), (new, new), "bilinear")
    torch.testing.assert_close(look_up(fitted, (new, new)), theirs, atol=1e-5, rtol=1e-5)
