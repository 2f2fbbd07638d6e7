"""Hostile and broken files: one typed error that names the file, no code run, no memory wasted, nothing changed."""

import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomise
from safetensors.torch import save_file
from torch import Tensor

import beitzoo
from beitzoo import Beit, CheckpointError
from beitzoo.weights import checkpoint
from beitzoo.zoo.architectures import ARCHITECTURES

Write = Callable[[Path], object]


def network() -> Beit:
    torch.manual_seed(0)
    model = Beit(ARCHITECTURES["test_beit"])
    randomise(model)
    return model


STATE: dict[str, Tensor] = {name: tensor.detach() for name, tensor in network().state_dict().items()}


class Attack:
    """Unpickled without restriction, creates the canary."""

    def __init__(self, canary: Path, call: Callable[..., object] = os.system) -> None:
        self.canary, self.call = canary, call

    def __reduce__(self) -> tuple[Any, ...]:
        if self.call is os.system:
            return os.system, (f"touch {self.canary}",)
        return self.call, (f"open({str(self.canary)!r}, 'w').close()",)


def whole(folder: Path) -> tuple[bytes, bytes]:
    save_file(STATE, folder / "whole.safetensors")
    torch.save({"model": STATE}, folder / "whole.pth")
    return (folder / "whole.safetensors").read_bytes(), (folder / "whole.pth").read_bytes()


def truncated(folder: Path) -> Iterator[Write]:
    for content in whole(folder):
        for cut in [0, 1, 2, 4, 7, 8, 9, 100, len(content) - 1, *range(1000, len(content), len(content) // 40)]:
            yield lambda path, part=content[:cut]: path.write_bytes(part)


def flipped(folder: Path) -> Iterator[Write]:
    content, _ = whole(folder)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for position in [*range(8), *range(8, header, header // 60)]:
        for bit in (1, 64):
            changed = bytearray(content)
            changed[position] ^= bit
            yield lambda path, part=bytes(changed): path.write_bytes(part)


def forged_headers(_: Path) -> Iterator[Write]:
    good = {"dtype": "F32", "shape": [1, 1, 64], "data_offsets": [0, 256]}
    changes: list[dict[str, object]] = [
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [256, 0]},
        {"data_offsets": [-1, 255]},
        {"data_offsets": [0, 255]},
        {"data_offsets": [0]},
        {"shape": [2**62, 4, 64]},
        {"shape": [1, 1, -64]},
        {"shape": [1, 1, 65]},
        {"shape": "64"},
        {"shape": None},
        {"dtype": "F128"},
        {"dtype": 32},
        {"dtype": "I64"},
        {"data_offsets": ["0", "256"]},
    ]
    for change in changes:
        yield lambda path, header={"cls_token": {**good, **change}}: path.write_bytes(forge(json.dumps(header)))
    overlap = {"cls_token": good, "pos_embed": good}
    for text in (json.dumps(overlap), '{"cls_token": {}}', "[]", "null", '{"a": ' * 5000, '"' * 100, "{}", "\xff"):
        yield lambda path, text=text: path.write_bytes(forge(text))
    for length in (2**64 - 1, 2**63, 2**40, 10**9, 0):
        yield lambda path, length=length: path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))


def forge(header: str) -> bytes:
    text = header.encode("latin-1")
    return struct.pack("<Q", len(text)) + text + bytes(256)


def hostile_pickles(folder: Path) -> Iterator[Write]:
    canary = folder / "canary"
    for call in (os.system, eval, exec):
        attack = Attack(canary, call)
        for document in (attack, {"model": attack}, {"model": STATE, "args": attack}, [attack], {"cls_token": attack}):
            yield lambda path, document=document: torch.save(document, path)
            yield lambda path, document=document: path.write_bytes(pickle.dumps(document))
            yield lambda path, document=document: torch.save(document, path, _use_new_zipfile_serialization=False)


def zip_tricks(folder: Path) -> Iterator[Write]:
    def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, content in entries.items():
                file.writestr(name, content)

    yield lambda path: archive(path, {})
    yield lambda path: archive(path, {"a/data.pkl": b""})
    yield lambda path: archive(path, {"a/data.pkl": b"\x80\x02}q\x00."})
    yield lambda path: archive(path, {"a/data.pkl": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    yield lambda path: archive(path, {"a/data.pkl": bytes(2**25)})
    yield lambda path: archive(path, {"../../data.pkl": b"\x80\x02}.", "a/version": b"3"})
    yield lambda path: torch.save({"cls_token": torch.zeros(1).expand(2**40)}, path)
    yield lambda path: torch.save({"cls_token": torch.zeros(2, 2).to_sparse()}, path)
    yield lambda path: torch.save({"cls_token": 3.0}, path)
    yield lambda path: torch.save({1: torch.zeros(1)}, path)
    yield lambda path: torch.save([STATE], path)
    yield lambda path: torch.save(network(), path)


def other_tensors(_: Path) -> Iterator[Write]:
    def with_(**changes: Tensor) -> dict[str, Tensor]:
        return {**STATE, **{name.replace("__", "."): tensor.contiguous() for name, tensor in changes.items()}}

    head = STATE["head.weight"]
    cases = [
        with_(head__weight=head[:, :-1]),
        with_(head__weight=head.t()),
        with_(head__weight=torch.zeros(0, 64)),
        with_(head__weight=head.long()),
        with_(head__weight=head > 0),
        with_(head__weight=head * torch.nan),
        with_(head__weight=head / 0),
        with_(cls_token=torch.zeros(1)),
        with_(norm__weight=torch.zeros(64)),
        with_(blocks__2__norm1__weight=torch.zeros(64)),
        {name: tensor for name, tensor in STATE.items() if name != "cls_token"},
        {name: tensor for name, tensor in STATE.items() if "blocks.1" not in name},
        {f"{part}.{name}": tensor.clone() for part in ("student", "teacher") for name, tensor in STATE.items()},
        {name.upper(): tensor for name, tensor in STATE.items()},
        {"beit.embeddings.cls_token": STATE["cls_token"]},
        {"layers.{}.attention": STATE["cls_token"].clone(), "embeddings.cls_token": STATE["cls_token"]},
        {"model.0.conv.weight": head},
        {},
    ]
    for case in cases:
        yield lambda path, case=case: save_file(case, path)
        yield lambda path, case=case: torch.save({"model": case}, path)


KINDS = [truncated, flipped, forged_headers, hostile_pickles, zip_tricks, other_tensors]


def test_there_are_enough_of_them(tmp_path: Path) -> None:
    assert sum(len(list(kind(tmp_path))) for kind in KINDS) >= 200


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_bad_checkpoint_is_one_typed_error(kind: Callable[[Path], Iterator[Write]], tmp_path: Path) -> None:
    """A flip may also hit what carries no meaning, such as padding; then the tensors must be the original ones."""
    model, path = network(), tmp_path / "bad file"
    for number, write in enumerate(kind(tmp_path)):
        write(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            checkpoint.load(model, checkpoint.read(path), str(path), model.config)
        except CheckpointError as error:
            assert str(path) in str(error), (number, str(error))
        else:
            assert kind is flipped, number
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown <= 256, (number, grown)
        assert all(torch.equal(tensor, STATE[name]) for name, tensor in model.state_dict().items()), number
        path.unlink()
    assert not (tmp_path / "canary").exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


TIMM = {"architecture": "test_beit", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 64, 64]}}
HUGGING = {
    "model_type": "beit",
    "architectures": ["BeitForImageClassification"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 64,
    "id2label": {str(i): str(i) for i in range(10)},
}
WRONG = [-1, 0, 2**70, 1.5, "x", None, [], {}, [1, 2, 3], "1; import os"]
NUMBERS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"]


def hostile_configs() -> Iterator[str]:
    for field in NUMBERS:
        yield from (json.dumps({**HUGGING, field: value}) for value in WRONG)
    for field in ("depth", "embed_dim", "num_heads", "img_size"):
        yield from (json.dumps({**TIMM, "model_args": {field: v}}) for v in WRONG if v is not None)
    yield from (json.dumps({**HUGGING, "layer_norm_eps": value}) for value in (-1, "x", None, [1]))
    yield from (json.dumps({**HUGGING, "hidden_act": value}) for value in ("relu", 3, None, "__import__('os')"))
    yield from (json.dumps({**HUGGING, "id2label": value}) for value in ([], "x", {"1": "a"}, {"0": 3}, {"x": "a"}))
    yield from (json.dumps({**HUGGING, "model_type": value}) for value in ("vit", "", 3, None, "../beit"))
    yield from (json.dumps({**TIMM, "architecture": v}) for v in ("vit_base_patch16_224", "", 3, None, "../test_beit"))
    yield from (json.dumps({**TIMM, "pretrained_cfg": v}) for v in (None, [], 3, {"mean": "x"}, {"crop_pct": 0}))
    yield from (json.dumps({**TIMM, "model_args": {"img_size": 2**20}}), json.dumps({**TIMM, "num_classes": 10**9}))
    yield from (json.dumps({**TIMM, "model_args": {"depth": 10**6}}), json.dumps({**TIMM, "model_args": {"eval": 1}}))
    yield from ("", "{", "[]", "null", "3", '"x"', "{}" * 3, "[" * 100_000, '{"a":' * 100_000, "\x00" * 100)
    yield '{"architecture": "' + "a" * 9_000_000 + '"}'


def test_there_are_enough_configs() -> None:
    assert len(list(hostile_configs())) >= 100


def test_a_bad_config_is_one_typed_error(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    for config in hostile_configs():
        (tmp_path / "config.json").write_text(config)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=r"config\.json"):
            beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 256 * 1024, config[:200]


@pytest.mark.parametrize("config", [TIMM, HUGGING], ids=["timm", "transformers"])
def test_places_that_a_config_names_are_not_looked_at(config: dict[str, object], tmp_path: Path) -> None:
    places = {"file": "/etc/passwd", "url": "http://127.0.0.1:9/x", "hf_hub_id": "a/b", "_name_or_path": "/etc"}
    nested = {"pretrained_cfg": {"input_size": [3, 64, 64], **places}} if "pretrained_cfg" in config else {}
    (tmp_path / "config.json").write_text(json.dumps({**config, **places, **nested, "auto_map": {"AutoModel": "x.y"}}))
    save_file(STATE, tmp_path / "model.safetensors")
    options = {} if config is TIMM else {"use_rel_pos_bias": True}
    model = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
    assert torch.equal(model.head.weight, STATE["head.weight"])
