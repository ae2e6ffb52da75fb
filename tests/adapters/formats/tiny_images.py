"""Tiny diffusion models with diffusers' own LoRA loaders, and what an adapter makes of a weight, written down in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from qlora_tools.adapters.portable import Layer, Portable

_UNET = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2}


def sd1() -> UNet2DConditionModel:
    """SD 1's plan in small: attention on all levels but the innermost, projections that are 1x1 convolutions."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **_UNET,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl() -> UNet2DConditionModel:
    """SDXL's plan in small: no attention outermost, linear projections, several transformer layers, the added conditions."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **_UNET,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20,
    )


def clip(projected: bool = False) -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=31,
        max_position_embeddings=8,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


class Sd(StableDiffusionLoraLoaderMixin):
    """As much of a pipeline as its LoRA loader needs."""

    hf_device_map = None

    def __init__(self) -> None:
        self.unet, self.text_encoder = sd1(), clip()
        self.components = {"unet": self.unet, "text_encoder": self.text_encoder}


class Sdxl(StableDiffusionXLLoraLoaderMixin):
    """The same for SDXL."""

    hf_device_map = None

    def __init__(self) -> None:
        self.unet, self.text_encoder, self.text_encoder_2 = sdxl(), clip(), clip(projected=True)
        self.components = {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}


def modules_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight.detach().double().clone() for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}


def merged_by_peft(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Module -> weight with the loaded adapter merged in by PEFT, for the modules that it changed."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
            found[name] = module.get_base_layer().weight.detach().double()
    return found


def product(layer: Layer) -> torch.Tensor:
    """scale B A in the shape of the weight."""
    rank = layer.rank
    flat = layer.scale * layer.b.double().reshape(-1, rank) @ layer.a.double().reshape(rank, -1)
    return flat.reshape(-1, *layer.a.shape[1:])


def applied(weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    """``weight`` under ``layer``, in float64."""
    changed = weight.double() + product(layer)
    if layer.magnitude is None:
        return changed
    lengths = changed.flatten(1).norm(dim=1)
    return changed * (layer.magnitude.double() / lengths).reshape(-1, *(1 for _ in weight.shape[1:]))


def assert_same_weights(model: torch.nn.Module, base: dict[str, torch.Tensor], portable: Portable) -> None:
    """PEFT's merge of what a foreign loader put into ``model`` equals ``portable`` on ``base``, layer for layer."""
    merged = merged_by_peft(model)
    assert set(merged) == set(portable.layers)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, applied(base[name], portable.layers[name]), rtol=0, atol=2e-5 * float(weight.abs().max()))


def random_pairs(modules: dict[str, tuple[int, ...]], seed: int = 5) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, down, up) for every module, ranks 1 to 4 in turn, the kernel in the down factor."""
    generator = torch.Generator().manual_seed(seed)
    for index, (name, shape) in enumerate(modules.items()):
        rank = 1 + index % 4
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * 0.3
        yield name, down, up
