"""The models of the zoo: name, how it is made, and inputs for a number of examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo_hand import HAND

__all__ = ["Entry", "catalogue", "perturb_"]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        source: the package that it comes from.
        name: its name there.
        make: returns it with random weights.
        inputs: of a number of examples, the keyword arguments of its forward, or one tensor.
        full: the same in the size that the model is made for; None if that is the same.
        forward: calls the model on the inputs, if the model itself does not.
        refusal: words of the expected refusal, if nothing can be done.
    """

    source: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    full: Callable[[int], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    refusal: str = ""


def catalogue() -> list[Entry]:
    """All models, in the order of the table."""
    return [*_torchvision(), *_timm(), *_transformers(), *_hand()]


def _images(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, channels, size, size)


def _hand() -> Iterator[Entry]:
    for name, (make, shape) in HAND.items():
        yield Entry("by hand", name, make, lambda n, s=shape: torch.randn(n, *s))


_TORCHVISION = {
    **dict.fromkeys(("alexnet", "squeezenet1_1", "densenet121"), 64),
    "vit_b_16": 112,
    **dict.fromkeys(("vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d"), 64),
    **dict.fromkeys(("wide_resnet50_2", "shufflenet_v2_x1_0", "mnasnet1_0"), 64),
    **dict.fromkeys(("regnet_x_400mf", "regnet_y_400mf", "googlenet", "convnext_tiny"), 64),
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "swin_t"), 64),
    "inception_v3": 139,
}


def _torchvision() -> Iterator[Entry]:
    from torchvision import models

    for name, size in _TORCHVISION.items():
        options: dict[str, Any] = {"weights": None, "num_classes": 10}
        if name in ("googlenet", "inception_v3"):
            options.update(init_weights=False, aux_logits=False)
        if name == "vit_b_16":
            options.update(image_size=size)
        make, full = getattr(models, name), None if name == "vit_b_16" else _images(224)
        yield Entry("torchvision", name, lambda m=make, o=options: m(**o), _images(size), full)
    for name in ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
        make = getattr(models.segmentation, name)
        options = {"weights": None, "weights_backbone": None, "num_classes": 5}
        full = _images(128)
        yield Entry("torchvision", name, lambda m=make, o=options: m(**o), _images(64), full)
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        make = getattr(models.video, name)
        yield Entry(
            "torchvision",
            name,
            lambda m=make: m(weights=None, num_classes=10),
            lambda n: torch.randn(n, 3, 4, 32, 32),
            lambda n: torch.randn(n, 3, 8, 64, 64),
        )
    yield Entry(
        "torchvision",
        "raft_small",
        lambda: models.optical_flow.raft_small(weights=None),
        lambda n: {
            "image1": torch.randn(n, 3, 128, 128).tanh(),
            "image2": torch.randn(n, 3, 128, 128).tanh(),
            "num_flow_updates": 2,
        },
    )

    def detector() -> nn.Module:
        options = {"weights": None, "weights_backbone": None, "num_classes": 5}
        return models.detection.fasterrcnn_resnet50_fpn(min_size=64, max_size=64, **options)

    def pictures(n: int) -> dict[str, Any]:
        target = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
        return {"images": [torch.rand(3, 64, 64) for _ in range(n)], "targets": [target] * n}

    name = "fasterrcnn_resnet50_fpn"
    # Its own forward branches on the boxes of the pictures; what it trains is read below.
    why = "if degenerate_boxes.any()"
    yield Entry("torchvision", name, detector, pictures, refusal=why)
    part = f"{name}.backbone"
    yield Entry("torchvision", part, lambda: detector().backbone, _images(64), _images(128))


_TIMM = (
    *("resnet26d", "seresnet18", "seresnet50", "repvgg_a0", "ghostnet_100", "hrnet_w18_small"),
    *("dla34", "res2net50_14w_8s", "skresnet18", "ecaresnet26t", "resnetblur18", "selecsls42b"),
    *("ese_vovnet19b_dw", "dpn68", "legacy_seresnet18", "legacy_senet154", "resnest14d"),
    *("densenet121", "xception41", "inception_v4", "regnetx_002", "nf_resnet26", "dm_nfnet_f0"),
    *("tf_efficientnet_b0", "mobilenetv3_small_050", "mixer_s32_224", "vit_tiny_patch16_224"),
    *("resmlp_12_224", "seresnext50_32x4d", "tresnet_m", "cspresnet50", "vgg11"),
    *("convnext_atto", "mobileone_s0", "rexnet_100"),
)
_LARGE = ("legacy_senet154", "dm_nfnet_f0", "vgg11")  # left out: minutes, and nothing new


def _timm() -> Iterator[Entry]:
    import timm

    known = set(timm.list_models())
    for name in _TIMM:
        if name in _LARGE or name not in known:
            continue
        fixed = any(word in name for word in ("mixer", "vit_", "resmlp"))
        options: dict[str, Any] = {"pretrained": False, "num_classes": 10}
        if fixed:
            options.update(img_size=112 if "vit" in name else 128)
        size = 112 if "vit" in name else 128 if fixed else 64
        if name in ("inception_v4", "xception41"):
            size = 160
        full = None if fixed else _images(224)

        def make(n: str = name, o: dict[str, Any] = options) -> nn.Module:
            return timm.create_model(n, **o)

        yield Entry("timm", name, make, _images(size), full)


def _transformers() -> Iterator[Entry]:
    import transformers as hf

    hf.logging.set_verbosity_error()
    wide = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}
    small = {**wide, "intermediate_size": 1536}
    text = {**small, "vocab_size": 99, "max_position_embeddings": 160}
    opt = {
        **{"hidden_size": 384, "ffn_dim": 1536, "num_hidden_layers": 4, "num_attention_heads": 6},
        **{"vocab_size": 99, "max_position_embeddings": 160, "word_embed_proj_dim": 384},
    }
    gpt2 = {"n_embd": 384, "n_layer": 4, "n_head": 6, "vocab_size": 99, "n_positions": 160}
    t5 = {
        "d_model": 384,
        "d_kv": 64,
        "d_ff": 1536,
        "num_layers": 4,
        "num_heads": 6,
        "vocab_size": 99,
    }
    seq2seq = {
        **{"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "vocab_size": 99},
        **{"encoder_attention_heads": 6, "decoder_attention_heads": 6},
        **{"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536},
    }
    whisper = {
        **{"max_source_positions": 100, "max_target_positions": 160, "num_mel_bins": 8},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    }
    wave = {
        **{"conv_dim": (64, 64), "conv_stride": (5, 2), "conv_kernel": (10, 3)},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    }
    stages = {"embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 2]}

    def tokens(*names: str) -> Callable[[int], dict[str, Tensor]]:
        return lambda n: {name: torch.randint(3, 99, (n, 128)) for name in names}

    def pixels(size: int) -> Callable[[int], dict[str, Tensor]]:
        return lambda n: {"pixel_values": torch.randn(n, 3, size, size)}

    def speech(n: int) -> dict[str, Tensor]:
        return {
            "input_features": torch.randn(n, 8, 200),
            "decoder_input_ids": torch.randint(3, 99, (n, 128)),
        }

    ids, both = tokens("input_ids"), tokens("input_ids", "decoder_input_ids")
    vit = {"image_size": 96, "patch_size": 8}
    table: list[tuple[str, str, Mapping[str, Any], Callable[[int], Any]]] = [
        ("BertModel", "BertConfig", text, ids),
        ("BertForMaskedLM", "BertConfig", {**text, "hidden_act": "relu"}, ids),
        ("GPT2LMHeadModel", "GPT2Config", gpt2, ids),
        ("LlamaForCausalLM", "LlamaConfig", {**text, "num_key_value_heads": 2}, ids),
        ("MistralForCausalLM", "MistralConfig", {**text, "num_key_value_heads": 2}, ids),
        ("OPTForCausalLM", "OPTConfig", opt, ids),
        ("T5ForConditionalGeneration", "T5Config", t5, both),
        ("BartModel", "BartConfig", {**seq2seq, "activation_function": "relu"}, both),
        (
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {**seq2seq, **whisper, "activation_function": "relu"},
            speech,
        ),
        (
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            {**small, **wave},
            lambda n: {"input_values": torch.randn(n, 1600)},
        ),
        ("ViTForImageClassification", "ViTConfig", {**small, **vit}, pixels(96)),
        (
            "ResNetForImageClassification",
            "ResNetConfig",
            {**stages, "layer_type": "basic"},
            pixels(64),
        ),
        ("RegNetForImageClassification", "RegNetConfig", {**stages, "groups_width": 8}, pixels(64)),
        (
            "ConvNextForImageClassification",
            "ConvNextConfig",
            {"hidden_sizes": [48, 96, 192], "depths": [2, 2, 2], "num_stages": 3},
            pixels(64),
        ),
    ]
    for model, config, options, inputs in table:

        def make(m: str = model, c: str = config, o: Mapping[str, Any] = options) -> nn.Module:
            return getattr(hf, m)(getattr(hf, c)(**o))

        full = pixels(224) if "Net" in model or "ConvNext" in model else None
        yield Entry("transformers", model, make, inputs, full)


@torch.no_grad()
def perturb_(model: nn.Module) -> None:
    """Make weights and statistics of norms, biases and scalars as uneven as training leaves them.

    What is one becomes about one, what is zero about zero, and matrices stay as they were drawn
    unless they are all zero.
    """
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    for x in tensors:
        if x.ndim > 1 and bool(x.any()):
            continue
        if bool((x >= 0).all()) and bool(x.any()):  # a norm's weight, a variance
            x.mul_(torch.randn_like(x).mul_(0.3).exp_())
        else:
            x.add_(torch.randn_like(x).mul_(0.1))


def keyword_inputs(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs as keyword arguments."""
    if isinstance(inputs, dict):
        return inputs
    first = next(iter(inspect.signature(model.forward).parameters))
    return {first: inputs}
