"""What one image costs, by closed formula."""

from beitzoo.zoo.networks import BeitConfig, MimConfig


def parameters(config: BeitConfig, mim: MimConfig | None = None) -> int:
    """Count the numbers that training can change, with those of a head of masked image modelling."""
    width, hidden = config.embed_dim, config.hidden_dim
    table = config.bias_rows * config.num_heads
    patches = width * (config.in_chans * config.patch_size[0] * config.patch_size[1] + 1)
    tokens = width * (1 + config.use_mask_token + config.use_abs_pos_emb * config.num_tokens)
    block = 4 * width * width + width + 2 * width * hidden + hidden + width  # linears
    block += 4 * width + 2 * width * config.qkv_bias + 2 * width * bool(config.init_values)  # norms, biases, scales
    block += config.use_rel_pos_bias * table
    head = config.num_classes * (width + 1)
    if mim is not None:
        head += mim.vocab_size * (width + 1)
        if mim.early_layers:
            own = 0 if mim.shared_lm_head else 2 * width + mim.vocab_size * (width + 1)
            head += mim.head_layers * block + own
    return patches + tokens + config.use_shared_rel_pos_bias * table + config.depth * block + 2 * width + head


def columns(config: BeitConfig, mim: MimConfig | None = None) -> dict[str, float]:
    """Return parameters, multiply-adds and activations in timm's columns and units.

    A head of masked image modelling counts among the parameters alone: inference does without it.
    """
    return {
        "param_count": round(parameters(config, mim) / 1e6, 2),
        "infer_gmacs": round(macs(config) / 1e9, 2),
        "infer_macts": round(activations(config) / 1e6, 2),
    }


def input_size(config: BeitConfig) -> str:
    """Write channels, height and width as the column of that name has them: 3x224x224."""
    return "x".join(map(str, (config.in_chans, *config.img_size)))


def macs(config: BeitConfig) -> int:
    """Count the multiply-adds of one image: linears, patch projection and the two products of attention."""
    n, c, patches = config.num_tokens, config.embed_dim, config.num_tokens - 1
    linears = n * (4 * c * c + 2 * c * config.hidden_dim)
    products = 2 * n * n * c
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    return patches * pixels * c + config.depth * (linears + products) + _head_rows(config) * c * config.num_classes


def mim_macs(config: BeitConfig, mim: MimConfig, masked: int) -> int:
    """Count the multiply-adds of one image, of which visual tokens of that many masked patches are predicted.

    The last MLP, and that of patch aggregation, are counted for the class token and masked patches alone: no head
    reads more.
    """
    n, c = config.num_tokens, config.embed_dim
    block = n * (4 * c * c + 2 * c * config.hidden_dim) + 2 * n * n * c
    branches = 2 if mim.early_layers else 1
    unread = (n - 1 - masked) * 2 * c * config.hidden_dim
    cut = branches - (mim.early_layers == config.depth)
    further = mim.head_layers * block if mim.early_layers else 0
    return macs(config) + further + branches * masked * c * mim.vocab_size - cut * unread


def activations(config: BeitConfig) -> int:
    """Count the numbers that those operations put out for one image (timm's `macts`)."""
    n, c, patches = config.num_tokens, config.embed_dim, config.num_tokens - 1
    linears = n * (5 * c + config.hidden_dim)
    products = config.num_heads * n * n + n * c
    return patches * c + config.depth * (linears + products) + _head_rows(config) * config.num_classes


def _head_rows(config: BeitConfig) -> int:
    return config.num_tokens if config.global_pool == "" else 1
