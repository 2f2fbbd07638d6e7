"""Every route from an image file is timed, and compared in pixels with the route beside it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beitzoo.measure import data_path
from beitzoo.measure.data_path import ROUTES, measure_data
from beitzoo.measure.options import BenchmarkOptions


def test_every_route_is_timed_beside_that_of_timm_or_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_path, "ROUTES", tuple(replace(route, looks=1) for route in ROUTES))
    images = tuple(Path("beitzoo/assets/samples", name) for name in ("digit_0.png", "digit_1.png"))
    threads = torch.get_num_threads()
    rows = measure_data(BenchmarkOptions(model="test_beit", bench="data", num_bench_iter=1, images=images))
    torch.set_num_threads(threads)
    assert len(rows) == len(ROUTES)
    own = [route.name == route.beside for route in ROUTES]
    assert sum(own) == 3
    assert all((row["ratio"], row["max_difference"]) == (1.0, 0.0) for row, one in zip(rows, own, strict=True) if one)
    assert rows[1]["max_difference"] == 0.0
    assert all(0 < float(row["max_difference"] or 0) <= 2 for row in (rows[5], rows[7]))
    assert all(float(row["images_per_sec"] or 0) > 0 and row["mean_pixels"] == 64 for row in rows)
