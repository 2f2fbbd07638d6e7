"""The networks of the zoo, by name: one literal table."""

from beitzoo.zoo.networks import BeitConfig

ARCHITECTURES: dict[str, BeitConfig] = {
    # BEiT: https://arxiv.org/abs/2106.08254
    "beit_base_patch16_224": BeitConfig(),
    "beit_base_patch16_384": BeitConfig(img_size=(384, 384)),
    "beit_large_patch16_224": BeitConfig(embed_dim=1024, depth=24, num_heads=16, init_values=1e-5),
    "beit_large_patch16_384": BeitConfig(img_size=(384, 384), embed_dim=1024, depth=24, num_heads=16, init_values=1e-5),
    "beit_large_patch16_512": BeitConfig(img_size=(512, 512), embed_dim=1024, depth=24, num_heads=16, init_values=1e-5),
    # BEiT v2: https://arxiv.org/abs/2208.06366
    "beitv2_base_patch16_224": BeitConfig(init_values=1e-5),
    "beitv2_large_patch16_224": BeitConfig(embed_dim=1024, depth=24, num_heads=16, init_values=1e-5),
    # Backbones of the segmentation models: https://github.com/microsoft/unilm/tree/master/beit and beit2
    "beit_base_patch16_640": BeitConfig(img_size=(640, 640)),
    "beit_large_patch16_640": BeitConfig(img_size=(640, 640), embed_dim=1024, depth=24, num_heads=16, init_values=1e-6),
    "beitv2_base_patch16_512": BeitConfig(img_size=(512, 512)),
    "beitv2_large_patch16_512": BeitConfig(
        img_size=(512, 512), embed_dim=1024, depth=24, num_heads=16, init_values=1e-6
    ),
    # Sizes of DeiT (https://arxiv.org/abs/2012.12877), without released weights.
    "beit_tiny_patch16_224": BeitConfig(embed_dim=192, num_heads=3),
    "beit_small_patch16_224": BeitConfig(embed_dim=384, num_heads=6),
    # Small enough to ship with the package and to train on a laptop.
    "beit_nano_patch4_32": BeitConfig(
        img_size=(32, 32), patch_size=(4, 4), in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=3
    ),
    # For tests: every part of the network, nothing more.
    "test_beit": BeitConfig(img_size=(64, 64), embed_dim=64, depth=2, num_heads=2, num_classes=10),
}
