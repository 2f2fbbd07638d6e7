"""The same network elsewhere: the peers that ours is compared with, and our own backends."""

from collections.abc import Iterable

from beitzoo.errors import check, closest
from beitzoo.measure.runtime_peers import onnxruntime_call, openvino_call, optimized_call
from beitzoo.measure.sides import Peer, require, version_of
from beitzoo.measure.torch_peers import beitzoo_network, timm_network, transformers_network

PEERS = {
    "beitzoo": Peer(("beitzoo",), module=beitzoo_network),
    "beitzoo+compile": Peer(("beitzoo",), module=beitzoo_network, compiled=True),
    "beitzoo+optimize": Peer(("beitzoo",), runtime=optimized_call),
    "timm": Peer(("timm",), module=timm_network),
    "timm+compile": Peer(("timm",), module=timm_network, compiled=True),
    "transformers": Peer(("transformers",), module=transformers_network),
    "onnxruntime": Peer(("onnxruntime", "onnx", "onnxscript"), runtime=onnxruntime_call),
    "openvino": Peer(("openvino", "onnx", "onnxscript"), runtime=openvino_call),
}


def check_names(names: Iterable[str]) -> None:
    """Refuse names that are no peers.

    Raises:
        InvalidValueError: Names the closest.
    """
    for name in names:
        check(name in PEERS, f"There is no peer {name!r}; {closest(name, PEERS)}")


def check_installed(name: str) -> None:
    """Make sure that what a peer needs is there.

    Raises:
        InvalidValueError: It is not; says how to install it.
    """
    require(name, PEERS[name].packages)


def peer_version(name: str) -> str:
    """Return the version that a row is about."""
    return version_of(PEERS[name].packages[0]) or ""
