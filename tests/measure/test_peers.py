"""A peer runs the same network with the same weights, or the row shows that it does not."""

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import beitzoo
from beitzoo.errors import InvalidValueError, UnsupportedError
from beitzoo.measure import comparison, runtime_peers, torch_peers
from beitzoo.measure.comparison import compare, publishable
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.peers import PEERS, check_installed
from beitzoo.measure.sides import Peer, Side
from beitzoo.measure.sweep import COMPARISON_COLUMNS
from beitzoo.results import read_rows
from beitzoo.zoo import costs
from beitzoo.zoo.networks import BeitConfig

SIDES = ("beitzoo", "transformers")
OPTIONS = BenchmarkOptions(model="test_beit", batch_size=2, num_warm_iter=0, num_bench_iter=1, peer="timm")


@pytest.mark.usefixtures("no_inference_tensors")
@pytest.mark.parametrize("peer", ["timm", "transformers"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_a_peer_of_the_same_precision_gives_the_same_numbers(peer: str, precision: Any, tolerance: float) -> None:
    row = compare(replace(OPTIONS, peer=peer, precision=precision))
    assert set(row) <= set(COMPARISON_COLUMNS)
    for name in ("output_difference", "subject_error", "peer_error"):
        assert row[name] is not None
        assert float(row[name] or 0) <= tolerance
    assert (float(row["subject_error"] or 0) > 1e-4) == (precision == "bfloat16")
    assert float(row["ratio"] or 0) == pytest.approx(
        float(row["peer_step_time"] or 0) / float(row["step_time"] or 0), rel=1e-3
    )
    assert row["peer_version"] == __import__(peer).__version__


def test_other_weights_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(side: Side) -> nn.Module:
        network = PEERS["beitzoo"].module(side)  # type: ignore[misc]
        network.get_parameter("blocks.1.attn.v_bias").data.zero_()
        return network

    monkeypatch.setitem(PEERS, "timm", Peer(("timm",), module=spoiled))
    assert float(compare(OPTIONS)["output_difference"] or 0) > 1e-3


@pytest.mark.usefixtures("no_inference_tensors")
@pytest.mark.parametrize("peer", ["timm", "transformers"])
def test_training_steps_are_compared(peer: str) -> None:
    # A size of its own: transformers keeps the index of a grid, and one made under inference mode cannot be trained.
    options = replace(OPTIONS, peer=peer, bench="train", precision="amp_bfloat16", opt="adamw", img_size=80)
    row = compare(options)
    assert 1e-5 < float(row["subject_error"] or 0) < 3e-2  # under autocast
    assert row["output_difference"] is not None
    assert float(row["output_difference"]) < 3e-2
    assert float(row["ratio"] or 0) > 0


MIM = replace(
    OPTIONS,
    peer="transformers",
    bench="train",
    model_kwargs=(("head", "mim"), ("vocab_size", 40)),
    opt="adamw",
    smoothing=0.0,
)


def test_transformers_has_the_same_loss_of_masked_patches(tmp_path: Path) -> None:
    ours, theirs = (comparison._training(comparison._side(replace(MIM, peer=name), tmp_path / name)) for name in SIDES)
    assert isinstance(theirs.network, torch_peers._Outputs)
    assert type(theirs.network.network).__name__ == "BeitForMaskedImageModeling"
    assert theirs.outputs().shape == (12, 40)
    for _ in range(2):  # before the first step, and behind it
        assert theirs.loss().item() == pytest.approx(ours.loss().item(), abs=1e-4)
        ours(), theirs()


@pytest.mark.usefixtures("no_inference_tensors")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("amp_bfloat16", 3e-2)])
def test_steps_of_masked_image_modelling_are_compared(precision: Any, tolerance: float) -> None:
    row = compare(replace(MIM, precision=precision))
    assert set(row) <= set(COMPARISON_COLUMNS)
    assert row["output_difference"] is not None
    assert float(row["output_difference"] or 0) < tolerance
    assert float(row["ratio"] or 0) > 0


@pytest.mark.usefixtures("no_inference_tensors")
def test_without_its_head_a_masked_image_model_is_compared_as_features(tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("test_beit", head="mim", vocab_size=40), tmp_path)
    options = replace(OPTIONS, model=str(tmp_path), peer="transformers")
    assert 0 < float(compare(options)["output_difference"] or 0) < 1e-5
    with pytest.raises(UnsupportedError, match=r"timm cannot build .*: it has no mask token"):
        compare(replace(options, peer="timm"))


def test_the_memory_of_training_is_measured() -> None:
    assert float(comparison.measure_memory(replace(MIM, peer="beitzoo"))["peak_memory"] or 0) > 100


@pytest.mark.parametrize("peer", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_runtimes_take_our_network_as_onnx(peer: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        row = compare(replace(OPTIONS, peer=peer, model_kwargs=(("depth", 1),)))
    assert 0 < float(row["peer_error"] or 0) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_int8_is_compared_with_what_it_is_not(peer: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = compare(replace(OPTIONS, peer=peer, precision="int8", subject_precision="float32"))
    assert 1e-4 < float(row["peer_error"] or 0) < 0.3
    assert "peer_gemm_share" not in row


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"peer": "onnxruntime", "precision": "bfloat16"},
            "onnxruntime is not measured in bfloat16: its kernels for x86 have no bfloat16 or float16 products; "
            "there are float32, int8",
        ),
        ({"peer": "openvino", "bench": "train"}, "openvino does not train"),
        ({"peer": "timm", "precision": "int8"}, "beitzoo has no int8"),
        (
            {"bench": "train", "model_kwargs": (("head", "mim"),)},
            "timm has no masked image modelling to train test_beit by",
        ),
        (
            {"peer": "transformers", "bench": "train", "model_kwargs": (("head", "mim"), ("early_layers", 1))},
            "transformers has no patch aggregation, with which test_beit is trained",
        ),
    ],
)
def test_what_cannot_be_compared_says_why(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        compare(replace(OPTIONS, **changed))


def test_int8_of_openvino_needs_its_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beitzoo.measure.sides.version_of", lambda package: None)
    with pytest.raises(InvalidValueError, match=r"openvino in int8 needs nncf; .* 'beitzoo\[peers\]'"):
        runtime_peers._calibrated(None, [])  # type: ignore[arg-type]


def test_every_installed_peer_is_found() -> None:
    for name, peer in PEERS.items():
        assert (peer.module is None) != (peer.runtime is None)
        modules = [package for package in peer.packages if importlib.util.find_spec(package) is None]
        if not modules and name != "beitzoo+optimize":
            check_installed(name)


def test_the_row_of_known_times() -> None:
    model = beitzoo.create_model("test_beit")
    times = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 12.0], "gemm": [0.5, 0.5, 0.5]}
    row = comparison._timed_columns(times, model.config, OPTIONS)
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (2.0, None, None)
    assert (row["step_time"], row["samples_per_sec"], row["peer_step_time"]) == (2000.0, 1.0, 2000.0)
    work = 2 * 2 * costs.macs(model.config)
    assert row["gflops"] == float(f"{work / 2.0 / 1e9:.4g}")
    share = float(row["gemm_share"] or 0)
    trained = comparison._gemm_columns(times, model.config, replace(OPTIONS, bench="train"))
    assert share == pytest.approx(float(row["gflops"] or 0) / float(row["gemm_gflops"] or 1), rel=1e-3)
    assert trained["gemm_share"] == pytest.approx(3 * share, rel=1e-3)


def test_peers_leave_our_weights_alone() -> None:
    model = beitzoo.create_model("test_beit").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = PEERS["beitzoo"].module(Side("beitzoo", model, torch.zeros(0), OPTIONS, Path()))  # type: ignore[misc]
    network.bfloat16()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shares_of_a_rate_that_bounds_nothing_are_left_out() -> None:
    row = {"ratio": "1.2", "ratio_low": "", "ratio_high": "", "gemm_gflops": "0.9", "gflops": "15.9"}
    for ours, theirs in (("18", "10.7"), ("0.9", "1.2"), ("1.2", "")):
        kept = publishable({**row, "gemm_share": ours, "peer_gemm_share": theirs})
        assert [kept[name] for name in ("gemm_gflops", "gemm_share", "peer_gemm_share")] == [None] * 3
        assert (kept["ratio"], kept["gflops"]) == ("1.2", "15.9")
    whole = {**row, "gemm_share": "1.05", "peer_gemm_share": "0.8"}
    assert publishable(whole) == whole


@pytest.mark.parametrize("error", ["0.7444", "nan"])
def test_a_side_that_computes_something_else_has_no_ratio(error: str) -> None:
    row = {"ratio": "1.08", "ratio_low": "1.07", "ratio_high": "1.13", "subject_error": "3e-07", "peer_error": error}
    kept = publishable(row)
    assert [kept[name] for name in ("ratio", "ratio_low", "ratio_high")] == [None] * 3
    share = f"{float(error):.1%}"
    assert kept["error"] == (
        f"outputs are off by more than 20% of the largest one, the peer's by {share}: it computes something else"
    )
    assert publishable({**row, "peer_error": "0.19"})["ratio"] == "1.08"


def test_the_results_of_this_repository_are_publishable() -> None:
    for row in read_rows(Path("results/comparison.csv")):
        assert {k: v or "" for k, v in publishable(row).items()} == row


def test_a_difference_is_relative_and_needs_like_shapes() -> None:
    assert comparison.relative_difference(torch.tensor([1.0, -2.0]), torch.tensor([1.5, -4.0])) == 0.5
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        comparison.relative_difference(torch.ones(1), torch.ones(2))


def test_matrix_products_have_the_shapes_of_the_linears() -> None:
    config = BeitConfig(embed_dim=64, num_heads=2, img_size=(32, 64))
    products = comparison.gemm_call(config, 3, torch.float32, torch.device("cpu"))()
    assert [tuple(product.shape) for product in products] == [(27, 192), (27, 64), (27, 256), (27, 64)]  # type: ignore[attr-defined]
    deeper, attention = (2, 1), 2 * config.num_tokens**2 * config.embed_dim
    block = [costs.macs(BeitConfig(**{**vars(config), "depth": depth})) for depth in deeper]
    assert comparison.gemm_flops(config, 3) == 2 * 3 * (block[0] - block[1] - attention)
