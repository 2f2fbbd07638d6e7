"""The command reads timm's flags, names mistakes before anything runs, and prints rows."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import beitzoo
from beitzoo.errors import UserError
from beitzoo.measure import benchmark, sweep
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.sweep import Outcome
from beitzoo.results import Row
from beitzoo.zoo.networks import MimConfig
from beitzoo.zoo.registry import list_models

TIMM_COLUMNS = ["model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size"]
FLAGS = """
    --model -m --model-list --compare --amp --amp-dtype --results-file --results-format --retry-failed --bench
    --batch-size -b --img-size --input-size --precision --device --checkpoint --num-classes --gp --model-kwargs
    --channels-last --torchcompile --torchcompile-mode --grad-checkpointing --num-warm-iter --num-bench-iter --no-retry
    --detail --seed --opt --opt-eps --opt-betas --momentum --weight-decay --lr --clip-grad --clip-mode --smoothing
    --drop --drop-path --subject --subject-precision --memory --images
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BenchmarkOptions]:
    """Collect what would be measured, and measure nothing."""
    collected: list[BenchmarkOptions] = []

    def record(jobs: Sequence[BenchmarkOptions], *_: Any) -> list[Row]:
        collected.extend(jobs)
        return [{"model": job.model} for job in jobs]

    monkeypatch.setattr(sweep, "sweep", record)
    return collected


def call(line: str) -> int:
    return benchmark.main(line.split())


def test_the_flags_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("--help")
    shown = re.findall(r"^  (-.*?)(?:   |$)", capsys.readouterr().out, flags=re.MULTILINE)
    flags = [flag for line in shown for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)]
    assert flags == ["-h", "--help", *FLAGS.split()]


def test_timms_command_line_is_read(asked: list[BenchmarkOptions]) -> None:
    line = "-m test_beit --bench train -b 8 --input-size 1 32 48 --amp --amp-dtype bfloat16 --torchcompile --opt adamw"
    line += " --opt-betas 0.8 0.99 --opt-eps 1e-6 --weight-decay 0.05 --clip-grad 1 --clip-mode agc --smoothing 0.2"
    line += " --model-kwargs depth=1 num_heads=4 --channels-last --grad-checkpointing --drop-path 0.1 --no-retry"
    line += " --num-warm-iter 0 --num-bench-iter 1 --device cpu --num-classes 5 --gp token --seed 3"
    assert call(line) == 0
    (job,) = asked
    assert (job.bench, job.batch_size, job.precision, job.torchcompile) == ("train", 8, "amp_bfloat16", "inductor")
    config = job.network()
    assert (config.in_chans, config.img_size, config.depth, config.num_heads) == (1, (32, 48), 1, 4)
    assert (config.num_classes, config.global_pool, config.drop_path_rate) == (5, "token", 0.1)
    assert (job.opt, job.opt_betas, job.opt_eps, job.weight_decay) == ("adamw", (0.8, 0.99), 1e-6, 0.05)
    assert (job.clip_grad, job.clip_mode, job.smoothing, job.retry, job.seed) == (1, "agc", 0.2, False, 3)
    assert (job.channels_last, job.grad_checkpointing, job.num_warm_iter, job.num_bench_iter) == (True, True, 0, 1)
    assert job.others() == (
        "--num-classes 5 --gp token --model-kwargs depth=1 num_heads=4 --channels-last --torchcompile inductor "
        "--grad-checkpointing --seed 3 --opt adamw --opt-eps 1e-06 --opt-betas 0.8 0.99 --weight-decay 0.05 "
        "--clip-grad 1.0 --clip-mode agc --smoothing 0.2 --drop-path 0.1"
    )


def test_defaults_are_timms_but_for_the_batch_of_a_cpu(asked: list[BenchmarkOptions]) -> None:
    assert call("--model test_beit --device cpu") == 0
    assert asked == [BenchmarkOptions(model="test_beit", bench="both")]
    assert asked[0].others() == ""
    assert (asked[0].num_warm_iter, asked[0].num_bench_iter, asked[0].opt) == (10, 40, "sgd")


def test_the_defaults_of_a_comparison_and_of_files(asked: list[BenchmarkOptions]) -> None:
    assert call("-m test_beit --compare timm,transformers --subject beitzoo+compile --device cpu") == 0
    assert asked == [
        BenchmarkOptions(model="test_beit", peer=peer, subject="beitzoo+compile") for peer in ("timm", "transformers")
    ]
    asked.clear()
    assert call("-m test_beit --bench load") == call("--bench data --images a.jpg b.jpg") == 0
    assert [(job.bench, job.num_bench_iter, len(job.images)) for job in asked] == [("load", 9, 0), ("data", 15, 2)]


def test_models_are_named_several_times_by_globs_and_by_lists(asked: list[BenchmarkOptions], tmp_path: Path) -> None:
    (tmp_path / "names").write_text("test_beit  # small\n\n# a comment\nbeitv2_*_224.*_in1k\ntest_beit\n")
    assert call(f"--model beit_t* -m beit_nano_patch4_32 --model-list {tmp_path}/names") == 0
    names = [job.model for job in asked]
    small = ["beit_tiny_patch16_224", "beit_nano_patch4_32", "test_beit"]
    assert names == [*small, *list_models("beitv2_*_224.*_in1k", pretrained=True)]
    assert len(names) > 5
    asked.clear()
    assert call("--model all") == 0
    assert [job.model for job in asked] == list_models()


def test_a_saved_model_can_be_timed(asked: list[BenchmarkOptions], tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("test_beit", img_size=48), tmp_path)
    assert call(f"--model local-dir:{tmp_path}") == 0
    assert asked[0].network().img_size == (48, 48)
    assert call(f"--model test_beit --img-size 48 --checkpoint {tmp_path}/model.safetensors") == 0
    assert asked[1].checkpoint == tmp_path / "model.safetensors"


def test_a_checkpoint_without_classes_is_run_as_a_backbone() -> None:
    assert BenchmarkOptions(model="beit_base_patch16_224.mim_in22k").network().num_classes == 0
    assert BenchmarkOptions(model="beit_base_patch16_224.mim_in22k", num_classes=3).network().num_classes == 3


def test_a_checkpoint_of_masked_image_modelling_is_trained_as_in_its_pretraining(asked: list[BenchmarkOptions]) -> None:
    line = "-m beitv2_base_patch16_224.mim_in1k --device cpu --bench"
    assert call(f"{line} train") == call(f"{line} both") == call(f"{line} inference") == 0
    assert call(f"{line} train --num-classes 10") == call(f"{line} train --opt sgd --smoothing 0.2") == 0
    flags = "--opt adamw --smoothing 0.0"
    assert [job.others() for job in asked] == [flags, flags, "", "--num-classes 10", "--smoothing 0.2"]
    heads = [MimConfig(early_layers=9), None, None, None, MimConfig(early_layers=9)]
    assert [job.mim for job in asked] == heads
    assert asked[1].phase("train").mim == heads[0]
    assert call("-m test_beit --bench train --model-kwargs head=mim vocab_size=40 --device cpu") == 0
    assert (asked[-1].mim, asked[-1].opt) == (MimConfig(vocab_size=40), "adamw")


def test_what_is_trained_is_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "run_in_child", lambda *_, **__: Outcome({}))
    counts = {"train": 91.97, "both": 91.97, "inference": 85.67}
    for bench, count in counts.items():
        assert call(f"-m beit_base_patch16_224.mim_in22k --bench {bench} --device cpu") == 0
        assert json.loads(capsys.readouterr().out.partition("--result\n")[2])["param_count"] == count


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model tset_beit", "did you mean 'test_beit'"),
        ("--model beit_base_patch16_224.mim", "it has in22k_ft_in22k_in1k"),
        ("--model vit_*", "No model's name is like 'vit_*'"),
        ("--bench train", "There is no model to time; give --model"),
        ("--model-list /absent", "/absent"),
        ("--model test_beit --precision int4", "--precision 'int4'; there are float32, float16"),
        ("--model test_beit --precision int8", "is for --compare"),
        ("--model test_beit --precision float16 --amp", "--amp with --precision float16"),
        ("--model test_beit --amp --amp-dtype int8", "--amp-dtype 'int8'; there are float16, bfloat16"),
        ("--model test_beit --bench speed", "--bench 'speed'; there are inference, train, both, profile"),
        ("--model test_beit --img-size 65", "use 64 or 80"),
        ("--model test_beit --input-size 3 0 64", "it must be a pair"),
        ("--model test_beit --num-bench-iter 0", "--num-bench-iter 0; it must be a whole number from 1 up"),
        ("--model test_beit --num-warm-iter -1", "--num-warm-iter -1"),
        ("--model test_beit -b 0", "--batch-size 0; it must be a whole number from 1 up"),
        ("--model test_beit --device gpu", "There is no device 'gpu' here"),
        ("--model test_beit --results-format xml", "--results-format 'xml'; there are csv, json"),
        ("--model test_beit --clip-mode l2", "--clip-mode 'l2'; there are norm, value, agc"),
        ("--model test_beit --model-kwargs depht=3", "did you mean 'depth'"),
        ("--model test_beit --model-kwargs depth", "Argument --model-kwargs: 'depth' is not field=value"),
        ("--model test_beit --seed x", "Argument --seed: invalid int value: 'x'; `beitzoo benchmark --help`"),
        ("--model test_beit --nmu-warm-iter 3", "There is no flag '--nmu-warm-iter'; did you mean '--num-warm-iter'"),
        ("--model beit_bas", "There is no model 'beit_bas'; did you mean 'beit_base_"),
        ("--model test_beit --subject-precision int4", "--subject-precision 'int4'; there are"),
        ("--model test_beit --bench load --img-size 64", "--bench load has no use for --img-size; leave that out"),
        ("--model test_beit --bench data --images x", "--bench data uses the transform of beit_base_patch16_224.in22k"),
        ("--bench data", "--bench data needs --images FILE"),
        (
            "--model test_beit --model-kwargs head=mim",
            "head=mim with --bench both; there are head=segment, and head=mim with",
        ),
        (
            "--model test_beit --bench train --model-kwargs head=mae",
            "head=mae with --bench train; there are head=segment",
        ),
        (
            "--model beit_base_patch16_224.mim_in22k --bench train --drop 0.1 --gp avg",
            "--drop and --gp without a head for classes",
        ),
        ("--model test_beit --images x", "--bench both has no use for --images"),
        ("--model test_beit --compare tim", "There is no peer 'tim'; did you mean 'timm'"),
        ("--model test_beit --compare timm --subject timm+zoo", "There is no peer 'timm+zoo'"),
        ("--model test_beit --compare timm --bench both", "--bench both compares nothing"),
    ],
)
def test_mistakes_are_named_before_anything_runs(line: str, message: str, asked: list[BenchmarkOptions]) -> None:
    with pytest.raises(UserError) as caught:
        call(line)
    assert message in str(caught.value)
    assert asked == []


def test_a_foreign_results_file_is_refused_before_the_run(asked: list[BenchmarkOptions], tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("a,b\n1,2\n")
    for path, message in ((table, "['a', 'b']"), (tmp_path, "Is a directory"), (Path("/proc/rows"), "Cannot write")):
        with pytest.raises(UserError) as caught:
            call(f"--model test_beit --results-file {path}")
        assert message in str(caught.value)
    assert (table.read_text(), asked) == ("a,b\n1,2\n", [])


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_row_is_printed_as_timm_prints_it_and_appended(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "run_in_child", lambda function, job, limit_memory: Outcome(function(job)))
    line = "--model test_beit -b 2 --img-size 48 --num-warm-iter 0 --num-bench-iter 1 --device cpu"
    line += f" --results-file {tmp_path}/rows --results-format {form}"
    assert call(line) == 0
    printed = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    assert list(printed)[:5] == TIMM_COLUMNS
    others = {"train_samples_per_sec", "train_batch_size", "param_count", "infer_gmacs"}
    assert {*TIMM_COLUMNS, *others} <= set(printed)
    assert (printed["infer_img_size"], printed["train_img_size"], printed["batch_size"]) == (48, 48, 2)
    text = (tmp_path / "rows").read_text()
    if form == "json":
        (kept,) = json.loads(text)
        assert {key: value for key, value in kept.items() if value != ""} == printed  # outside of git, no commit
    else:
        assert text.splitlines()[0] == ",".join(sweep.BENCHMARK_COLUMNS)
        assert len(text.splitlines()) == 2
    assert call(line) == 0  # the row is there: printed again, not measured again
    again = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    assert {key: str(value) for key, value in again.items()} == {key: str(value) for key, value in printed.items()}
    assert (tmp_path / "rows").read_text() == text


def test_a_failure_is_a_row_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(function: object, job: BenchmarkOptions, limit_memory: bool) -> Outcome[Row]:
        failing = job.model in ("test_beit", "beit_tiny_patch16_224")
        return Outcome(error="Boom") if failing else Outcome({"infer_samples_per_sec": 3.0})

    monkeypatch.setattr(sweep, "run_in_child", fail)
    assert call("--model test_beit --bench train") == 1
    row = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    assert (row["model"], row["error"], row["param_count"]) == ("test_beit", "Boom", 0.15)
    assert call("--model beit_[nt]* --bench inference") == 1
    output = capsys.readouterr()
    rows = json.loads(output.out.partition("--result\n")[2])
    assert [(row["model"], row.get("error")) for row in rows] == [
        ("beit_nano_patch4_32", None),
        ("beit_tiny_patch16_224", "Boom"),
    ]
    assert f"1 of {len(rows)} rows failed" in output.err


def test_a_profile_counts_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sweep, "run_in_child", None)
    assert call("--model beit_large_patch16_224 --bench profile --img-size 512") == 0
    row = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    assert (row["infer_gmacs"], row["infer_macts"], row["infer_batch_size"]) == (361.99, 656.39, 1)
