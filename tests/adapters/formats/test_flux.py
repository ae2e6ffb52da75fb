from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

from qlora_tools.adapters.formats import diffusers, flux, kohya, lycoris
from qlora_tools.adapters.formats.names import flat
from qlora_tools.adapters.portable import Portable
from qlora_tools.errors import IncompatibleError, UnsupportedError
from tests.adapters.formats.tiny_images import modules_of, product


def transformer(heads=24, width=128):
    """Flux in its true widths (diffusers' converter has them built in) or small, without memory for weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=heads,
            attention_head_dim=width,
            joint_attention_dim=8,
            pooled_projection_dim=4,
            guidance_embeds=True,
        )


@pytest.fixture(scope="module")
def modules():
    return modules_of(transformer())


def original(modules, alpha=2.0):
    """A kohya file with every original layer of the base."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parts in flux.stacks(modules):
        rows, inputs = sum(modules[part][0] for part in parts), modules[parts[0]][1]
        key = f"lora_unet_{flat(name)}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(1, inputs, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 1, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def test_every_original_layer_of_the_blocks_equals_diffusers_own_converter(modules):
    tensors = {key: tensor for key, tensor in original(modules).items() if "_blocks_" in key}
    ours = kohya.read(tensors, {}, modules)
    theirs = diffusers.read(_convert_kohya_flux_lora_to_diffusers(dict(tensors)), {}, modules)
    assert set(ours) == set(theirs) == {"transformer"}
    ours, theirs = ours["transformer"].layers, theirs["transformer"].layers
    assert set(ours) == set(theirs) and len(ours) == 20
    for name, layer in ours.items():
        probe = torch.randn(modules[name][1], dtype=torch.float64)
        answers = [found.scale * found.b.double() @ (found.a.double() @ probe) for found in (layer, theirs[name])]
        torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-6)


def test_every_linear_of_the_base_has_an_original_name(modules):
    covered = [part for _, parts in flux.stacks(modules) for part in parts]
    assert sorted(covered) == sorted(modules)


def test_halves_of_the_last_modulation_change_places():
    small = modules_of(transformer(2, 4))
    tensors = {key: tensor for key, tensor in original(small, 1.0).items() if "adaLN" in key}
    layer = kohya.read(tensors, {}, small)["transformer"].layers["norm_out.linear"]
    up = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(layer.b, torch.cat([up[8:], up[:8]]))
    renamed = {key.replace("final_layer_adaLN_modulation_1", "norm_out_linear"): tensor for key, tensor in tensors.items()}
    assert torch.equal(kohya.read(renamed, {}, small)["transformer"].layers["norm_out.linear"].b, up)


@pytest.mark.parametrize("style", ["lora_A.weight lora_B.weight", "lora_down.weight lora_up.weight"])
def test_dotted_original_names_are_cut_too(style):
    small = modules_of(transformer(2, 4))
    down, up = style.split()
    name = "diffusion_model.single_blocks.0.linear1"
    tensors = {f"{name}.{down}": torch.randn(2, 8), f"{name}.{up}": torch.randn(56, 2)}
    layers = diffusers.read(tensors, {}, {"transformer": small})["transformer"].layers
    stacked = torch.cat([product(layers[f"single_transformer_blocks.0.{part}"]) for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    torch.testing.assert_close(stacked, tensors[f"{name}.{up}"].double() @ tensors[f"{name}.{down}"].double())


def test_lengths_of_a_stack_are_cut_with_its_rows():
    small = modules_of(transformer(2, 4))
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    lengths = torch.rand(24) + 0.1
    tensors = {f"{key}.lokr_w1": torch.ones(1, 1), f"{key}.lokr_w2": torch.randn(24, 8), f"{key}.dora_scale": lengths[:, None]}
    layers = lycoris.read(tensors, {}, small)["transformer"].layers
    assert torch.equal(torch.cat([layers[f"transformer_blocks.0.attn.to_{part}"].magnitude for part in "qkv"]), lengths)
    torch.testing.assert_close(product(layers["transformer_blocks.0.attn.to_k"]), tensors[f"{key}.lokr_w2"][8:16].double())


def test_stack_of_another_width_is_refused():
    small = modules_of(transformer(2, 4))
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    with pytest.raises(IncompatibleError, match="img_attn_qkv"):
        kohya.read({f"{key}.lora_down.weight": torch.ones(1, 8), f"{key}.lora_up.weight": torch.ones(27, 1)}, {}, small)


def test_stack_beside_one_of_its_parts_is_refused():
    small = modules_of(transformer(2, 4))
    tensors = {}
    for key, rows in (("lora_unet_double_blocks_0_img_attn_qkv", 24), ("lora_unet_transformer_blocks_0_attn_to_k", 8)):
        tensors |= {f"{key}.lora_down.weight": torch.ones(1, 8), f"{key}.lora_up.weight": torch.ones(rows, 1)}
    with pytest.raises(IncompatibleError, match=r"attn\.to_k"):
        kohya.read(tensors, {}, small)


def test_other_transformers_with_stacks_are_refused_by_name():
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    with pytest.raises(UnsupportedError, match="joint_blocks"):
        kohya.read({f"{key}.lora_down.weight": torch.ones(1, 8), f"{key}.lora_up.weight": torch.ones(24, 1)}, {}, {"transformer_blocks.0.attn.to_q": (8, 8)})


def test_kohya_is_not_written_for_transformers():
    with pytest.raises(UnsupportedError, match="transformer"):
        kohya.write({"transformer": Portable(kohya.read(original(modules_of(transformer(2, 4))), {}, modules_of(transformer(2, 4)))["transformer"].layers)})
