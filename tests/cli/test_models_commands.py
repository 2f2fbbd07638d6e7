"""list, info, download and verify: what they print, and how they fail."""

import json
from pathlib import Path

from commands import run
from fake_hub import FakeHub

import beitzoo
from beitzoo.zoo.pretrained import PRETRAINED


def test_list() -> None:
    assert run("list").stdout.split() == beitzoo.list_models()
    assert run("list", "beitv2*", "--pretrained").stdout.split() == beitzoo.list_pretrained("beitv2*")


def test_the_table_of_checkpoints() -> None:
    header, _, *rows = run("list", "--markdown").stdout.splitlines()
    assert header == "| model | input | parameters | GMACs | classes | top-1 % |"
    assert [row.split("`")[1] for row in rows] == list(PRETRAINED)
    expected = "| `beit_base_patch16_384.in22k_ft_in22k_in1k` | 384x384 | 86.7 M | 55.48 | 1,000 | 86.8 |"
    assert expected in rows


def test_info() -> None:
    facts = json.loads(run("info", "beit_base_patch16_224", "--json").stdout)
    accuracy = {(row["data"], row["source"][:4]): row["top1"] for row in facts.pop("accuracy")}
    assert accuracy["imagenet", "timm"] == 85.238
    assert accuracy["imagenet-a", "timm"] == 50.747
    assert accuracy["imagenet", "micr"] == 85.2
    assert facts == {
        "model": "beit_base_patch16_224.in22k_ft_in22k_in1k",
        "parameters": 86_530_984,
        "gmacs": 17.56,
        "activations_millions": 23.9,
        "classes": 1000,
        "input_size": [3, 224, 224],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "weights": [
            "hub timm/beit_base_patch16_224.in22k_ft_in22k_in1k/model.safetensors at main",
            "hub microsoft/beit-base-patch16-224/model.safetensors at main",
            "hub microsoft/beit-base-patch16-224/pytorch_model.bin at main",
            "https://github.com/addf400/files/releases/download/v1.0/beit_base_patch16_224_pt22k_ft22kto1k.pth",
        ],
        "license": "MIT",
        "paper": "https://arxiv.org/abs/2106.08254",
    }
    table = run("info", "beit_base_patch16_224").stdout
    assert "86,530,984" in table
    assert "17.56" in table
    assert "imagenet: top1 85.238, top5 97.654 (timm" in table


def test_info_of_a_pretrained_backbone() -> None:
    facts = json.loads(run("info", "beitv2_large_patch16_224.mim_in1k", "--json").stdout)
    assert (facts["parameters"], facts["classes"]) == (303_137_216, 0)


def test_info_of_an_architecture_without_weights() -> None:
    facts = json.loads(run("info", "test_beit", "--json").stdout)
    assert (facts["weights"], facts["license"]) == ([], None)
    assert "none" in run("info", "test_beit").stdout


def test_download_then_verify(fake_hub: FakeHub, tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("test_beit"), tmp_path / "repo")
    fake_hub.serve_folder(tmp_path / "repo")
    name, cache = "hf-hub:owner/name", ("--cache-dir", str(tmp_path / "cache"))
    result = run("download", "beit_nano_patch4_32.dig*", name, "hf-hub:owner/absent", *cache)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["beit_nano_patch4_32.digits", name]
    assert "hf-hub:owner/absent: Could not get owner/absent/config.json" in result.stderr
    assert run("verify", name, *cache).stdout == f"verified        {lines[1]}\n"
    weights = Path(lines[1].split("  ")[1]).resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    result = run("verify", name, "--json", *cache)
    (row,) = json.loads(result.stdout)
    assert (result.exit_code, row["model"], row["state"]) == (1, name, "damaged")
    assert run("download", name, *cache).exit_code == 0
    assert weights.read_bytes() == content


def test_verify_looks_at_all_that_is_here(fake_hub: FakeHub) -> None:
    result = run("verify")
    assert result.exit_code == 0
    assert result.stdout.split()[:2] == ["verified", "beit_nano_patch4_32.digits"]
    result = run("verify", "beit_base_patch16_224")
    assert (result.exit_code, result.stdout) == (1, "not downloaded  beit_base_patch16_224\n")
    assert fake_hub.requests == []
