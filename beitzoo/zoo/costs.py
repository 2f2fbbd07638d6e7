"""What one image costs, by closed formula."""

from beitzoo.zoo.config import BeitConfig


def macs(config: BeitConfig) -> int:
    """Count the multiply-adds of one image: linears, patch projection and the two products of attention."""
    n, c, patches = config.num_tokens, config.embed_dim, config.num_tokens - 1
    linears = n * (4 * c * c + 2 * c * config.hidden_dim)
    products = 2 * n * n * c
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    return patches * pixels * c + config.depth * (linears + products) + _head_rows(config) * c * config.num_classes


def activations(config: BeitConfig) -> int:
    """Count the numbers that those operations put out for one image (timm's `macts`)."""
    n, c, patches = config.num_tokens, config.embed_dim, config.num_tokens - 1
    linears = n * (5 * c + config.hidden_dim)
    products = config.num_heads * n * n + n * c
    return patches * c + config.depth * (linears + products) + _head_rows(config) * config.num_classes


def _head_rows(config: BeitConfig) -> int:
    return config.num_tokens if config.global_pool == "" else 1
