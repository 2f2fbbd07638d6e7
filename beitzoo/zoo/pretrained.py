"""The checkpoints of the zoo, by name: one literal table. An architecture's first row is its default.

Sources are tried in order and hold the same weights: timm's repositories, Microsoft's for transformers, and the
authors' release files. None of them states a sha256 in public, so none is written down here.
"""

from beitzoo.zoo.checkpoints import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Classify,
    DataConfig,
    HubFile,
    Mim,
    PackageFile,
    PretrainedConfig,
    ReleaseFile,
    Segment,
)
from beitzoo.zoo.networks import MimConfig

PRETRAINED: dict[str, PretrainedConfig] = {
    "beit_base_patch16_224.in22k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_base_patch16_224.in22k_ft_in22k_in1k"),
            HubFile("microsoft/beit-base-patch16-224"),
            HubFile("microsoft/beit-base-patch16-224", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_base_patch16_224_pt22k_ft22kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_base_patch16_224.in22k_ft_in22k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_base_patch16_224.in22k_ft_in22k"),
            HubFile("microsoft/beit-base-patch16-224-pt22k-ft22k", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_base_patch16_224_pt22k_ft22k.pth"),
        ),
        head=Classify(num_classes=21_841, labels="imagenet-22k"),
        data=DataConfig(),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_base_patch16_224.in22k_ft_in1k": PretrainedConfig(
        sources=(ReleaseFile("v1.0", "beit_base_patch16_224_pt22k_ft1k.pth"),),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_base_patch16_224.mim_in22k": PretrainedConfig(
        sources=(
            HubFile("microsoft/beit-base-patch16-224-pt22k"),
            ReleaseFile("v1.0", "beit_base_patch16_224_pt22k.pth"),
        ),
        head=Mim(tokenizer="dvae_patch8_112.dalle"),
        data=DataConfig(),
        overrides={
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_fc_norm": False,
            "use_mask_token": True,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_base_patch16_224.mim_in1k_800e": PretrainedConfig(
        sources=(ReleaseFile("v1.0", "beit_base_patch16_224_pt1k_800ep.pth"),),
        head=Mim(tokenizer="dvae_patch8_112.dalle"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        overrides={
            "use_rel_pos_bias": False,
            "use_abs_pos_emb": True,
            "init_values": 0.0,
            "use_fc_norm": False,
            "use_mask_token": True,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_base_patch16_384.in22k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_base_patch16_384.in22k_ft_in22k_in1k"),
            HubFile("microsoft/beit-base-patch16-384"),
            HubFile("microsoft/beit-base-patch16-384", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_base_patch16_384_pt22k_ft22kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(input_size=(3, 384, 384), crop_pct=1.0),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_base_patch16_640.in22k_ft_in22k_ade20k": PretrainedConfig(
        sources=(
            HubFile("microsoft/beit-base-finetuned-ade-640-640", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_base_patch16_640_pt22k_ft22ktoade20k.pth"),
        ),
        head=Segment(labels="ade20k"),
        data=DataConfig(
            input_size=(3, 640, 640), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, reduce_zero_label=True
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_224.in22k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_large_patch16_224.in22k_ft_in22k_in1k"),
            HubFile("microsoft/beit-large-patch16-224"),
            HubFile("microsoft/beit-large-patch16-224", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_large_patch16_224_pt22k_ft22kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_224.in22k_ft_in22k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_large_patch16_224.in22k_ft_in22k"),
            HubFile("microsoft/beit-large-patch16-224-pt22k-ft22k", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_large_patch16_224_pt22k_ft22k.pth"),
        ),
        head=Classify(num_classes=21_841, labels="imagenet-22k"),
        data=DataConfig(),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_224.in22k_ft_in1k": PretrainedConfig(
        sources=(ReleaseFile("v1.0", "beit_large_patch16_224_pt22k_ft1k.pth"),),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_224.mim_in22k": PretrainedConfig(
        sources=(
            HubFile("microsoft/beit-large-patch16-224-pt22k"),
            ReleaseFile("v1.0", "beit_large_patch16_224_pt22k.pth"),
        ),
        head=Mim(tokenizer="dvae_patch8_112.dalle"),
        data=DataConfig(),
        overrides={
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_fc_norm": False,
            "use_mask_token": True,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_384.in22k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_large_patch16_384.in22k_ft_in22k_in1k"),
            HubFile("microsoft/beit-large-patch16-384"),
            HubFile("microsoft/beit-large-patch16-384", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_large_patch16_384_pt22k_ft22kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(input_size=(3, 384, 384), crop_pct=1.0),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_512.in22k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beit_large_patch16_512.in22k_ft_in22k_in1k"),
            HubFile("microsoft/beit-large-patch16-512"),
            HubFile("microsoft/beit-large-patch16-512", "pytorch_model.bin"),
            ReleaseFile("v1.0", "beit_large_patch16_512_pt22k_ft22kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(input_size=(3, 512, 512), crop_pct=1.0),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beit_large_patch16_640.in22k_ft_in22k_ade20k": PretrainedConfig(
        sources=(
            HubFile("microsoft/beit-large-finetuned-ade-640-640"),
            ReleaseFile("v1.0", "beit_large_patch16_640_pt22k_ft22ktoade20k.pth"),
        ),
        head=Segment(labels="ade20k"),
        data=DataConfig(
            input_size=(3, 640, 640), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, reduce_zero_label=True
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2106.08254",
    ),
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k"),
            ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_ft21kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_224.in1k_ft_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beitv2_base_patch16_224.in1k_ft_in1k"),
            ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_ft1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_224.in1k_ft_in22k": PretrainedConfig(
        sources=(
            HubFile("timm/beitv2_base_patch16_224.in1k_ft_in22k"),
            ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_ft21k.pth"),
        ),
        head=Classify(num_classes=21_841, labels="imagenet-22k"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_224.in1k_300e_ft_in1k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_300e_ft1k.pth"),),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_224.mim_in1k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k.pth"),),
        head=Mim(network=MimConfig(early_layers=9), tokenizer="vqkd_encoder_base_decoder_3x768x12.clip"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        overrides={
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_fc_norm": False,
            "use_mask_token": True,
            "init_values": 0.1,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_224.mim_in1k_300e": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_300e.pth"),),
        head=Mim(network=MimConfig(early_layers=9), tokenizer="vqkd_encoder_base_decoder_3x768x12.clip"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        overrides={
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_fc_norm": False,
            "use_mask_token": True,
            "init_values": 0.1,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_512.in1k_ft_in22k_ade20k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_ft21ktoade20k.pth"),),
        head=Segment(labels="ade20k"),
        data=DataConfig(
            input_size=(3, 512, 512), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, reduce_zero_label=True
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_base_patch16_512.in1k_ade20k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_base_patch16_224_pt1k_ftade20k.pth"),),
        head=Segment(labels="ade20k"),
        data=DataConfig(
            input_size=(3, 512, 512), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, reduce_zero_label=True
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k"),
            ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_ft21kto1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(crop_pct=0.95, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_224.in1k_ft_in1k": PretrainedConfig(
        sources=(
            HubFile("timm/beitv2_large_patch16_224.in1k_ft_in1k"),
            ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_ft1k.pth"),
        ),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(crop_pct=0.95, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_224.in1k_ft_in22k": PretrainedConfig(
        sources=(
            HubFile("timm/beitv2_large_patch16_224.in1k_ft_in22k"),
            ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_ft21k.pth"),
        ),
        head=Classify(num_classes=21_841, labels="imagenet-22k"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_224.in1k_300e_ft_in1k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_300e_ft1k.pth"),),
        head=Classify(num_classes=1000, labels="imagenet-1k"),
        data=DataConfig(crop_pct=0.95, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_224.mim_in1k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k.pth"),),
        head=Mim(network=MimConfig(early_layers=21), tokenizer="vqkd_encoder_base_decoder_3x768x12.clip"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        overrides={
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_fc_norm": False,
            "use_mask_token": True,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_224.mim_in1k_300e": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_300e.pth"),),
        head=Mim(network=MimConfig(early_layers=21), tokenizer="vqkd_encoder_base_decoder_3x768x12.clip"),
        data=DataConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        overrides={
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_fc_norm": False,
            "use_mask_token": True,
        },
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_512.in1k_ft_in22k_ade20k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_ft21ktoade20k.pth"),),
        head=Segment(labels="ade20k"),
        data=DataConfig(
            input_size=(3, 512, 512), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, reduce_zero_label=True
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beitv2_large_patch16_512.in1k_ade20k": PretrainedConfig(
        sources=(ReleaseFile("BEiT-v2", "beitv2_large_patch16_224_pt1k_ftade20k.pth"),),
        head=Segment(labels="ade20k"),
        data=DataConfig(
            input_size=(3, 512, 512), crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD, reduce_zero_label=True
        ),
        license="MIT",
        paper="https://arxiv.org/abs/2208.06366",
    ),
    "beit_nano_patch4_32.digits": PretrainedConfig(
        sources=(
            PackageFile(
                "assets/beit_nano_patch4_32.digits.safetensors",
                sha256="86f94483faac41c91849971b5667f21c6eb24864415a1aa7e396c697bbd519bb",
            ),
        ),
        head=Classify(num_classes=10, labels="digits"),
        data=DataConfig(input_size=(1, 32, 32), mean=(0.305,), std=(0.376,), crop_pct=1.0),
        license="Apache-2.0",
    ),
}
