"""Denoising networks of diffusers as traced graphs."""

from functools import lru_cache

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.traced.diffusion import diffusion_subject
from qlora_tools.export.traced.export import draw, fill, plan_traced
from qlora_tools.export.traced.parity import check_traced
from qlora_tools.models.work import is_of_diffusers
from tests.export.tiny_decoders import MemorySource
from tests.export.traced.tiny_models import Tiny, relative_error, run

pytest.importorskip("diffusers")
UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [32], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"], "cross_attention_dim": 24,
        "attention_head_dim": 2, "norm_num_groups": 8, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 60, "time_cond_proj_dim": None}  # fmt: skip
PLAIN = {"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [16], "layers_per_block": 1,
         "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 4, "add_attention": False}  # fmt: skip


@lru_cache
def tiny(name):
    config = {"unet": UNET, "plain": PLAIN}[name]
    subject = diffusion_subject(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = subject.build(torch.float32).eval().requires_grad_(False)
    source = MemorySource({key: value.clone() for key, value in model.state_dict().items()})
    return Tiny(config, model, source, subject, draw(subject, source, config))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [("unet", "fp32"), ("unet", "int8"), ("unet", "int4"), ("plain", "int8")])
def test_graph_agrees_with_diffusers_at_both_sizes(name, scheme, tmp_path):
    model = tiny(name)
    export = model.export(scheme, tmp_path)
    bound = {"fp32": 1e-5, "int8": 0.05, "int4": 0.3}[scheme]
    for size in (0, 1):
        assert relative_error(run(tmp_path, model.subject.draw(size))["out_sample"], model.answers(size)["out_sample"]) < bound
    assert check_traced(export, model.source, tmp_path).error_carried < {"fp32": 1e-5}.get(scheme, 0.05)


def test_names_and_axes_are_those_that_an_image_pipeline_opens():
    inputs = tiny("unet").drawn.traced.model.graph.inputs
    assert {value.name: [str(axis) for axis in value.shape] for value in inputs} == {
        "sample": ["batch_size", "4", "height", "width"],
        "timestep": [],
        "encoder_hidden_states": ["batch_size", "sequence_length", "24"],
        "text_embeds": ["batch_size", "12"],
        "time_ids": ["batch_size", "6"],
    }
    assert tiny("unet").drawn.traced.outputs == ("out_sample",)


def test_convolutions_and_linears_are_carried_in_int8_and_the_ends_are_not():
    export = fill(tiny("unet").drawn, tiny("unet").source, scheme_of("int8"))
    taken = {one.weight for one in export.convolutions}
    assert "down_blocks.0.resnets.0.conv1.weight" in taken and "down_blocks.0.attentions.0.proj_in.weight" in taken
    assert not {"conv_in.weight", "conv_out.weight"} & taken
    assert export.weights["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"].form is not None


def test_a_folder_of_a_pipeline_is_planned_as_it_lies(tmp_path):
    live = tiny("plain").model
    live.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert is_of_diffusers(checkpoint.config)
    export = plan_traced(checkpoint, checkpoint.config, "int8")
    assert export.task == "denoising" and export.input_names == ("sample", "timestep")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"addition_embed_type": "image_hint"}, "image_hint"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
    ],
)
def test_what_is_not_drawn_is_refused_by_name(change, message):
    with pytest.raises(UnsupportedError, match=message):
        diffusion_subject(UNET | change)
