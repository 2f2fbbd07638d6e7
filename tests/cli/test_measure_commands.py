"""report: what it writes."""

from pathlib import Path

from commands import run


def test_report_draws_and_writes(tmp_path: Path) -> None:
    result = run("report", "--results", str(tmp_path))
    assert isinstance(result.exception, ValueError)
    assert "There are no measured rows" in str(result.exception)
    assert len(list((tmp_path / "accuracy").glob("*.csv"))) == 9
