"""evaluate: what it prints."""

from pathlib import Path

from commands import run


def test_evaluate_prints_and_appends_rows(tmp_path: Path) -> None:
    model, table = "beit_nano_patch4_32.digits", tmp_path / "r.csv"
    result = run("evaluate", model, model, "--data", "digits", "--results-file", str(table))
    assert result.exit_code == 0
    assert "± 0.00 (mean ± sd of 2)" in result.stdout
    assert len(table.read_text().splitlines()) == 3
