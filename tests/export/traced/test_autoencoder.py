"""The halves of an image pipeline's autoencoder as traced graphs."""

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UsageError
from qlora_tools.export.traced.diffusion import diffusion_subject
from qlora_tools.export.traced.export import plan_traced, write_traced
from qlora_tools.export.traced.parity import check_traced
from tests.export.traced.tiny_models import relative_error, run

diffusers = pytest.importorskip("diffusers")
SIZES = {"block_out_channels": [16, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1,
         "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16}  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**SIZES).eval()
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return model, open_checkpoint(folder)


@pytest.mark.parametrize(
    ("task", "scheme", "given", "result"), [("vae-encoder", "fp32", "sample", "latent_parameters"), ("vae-decoder", "int8", "latent_sample", "sample")]
)
def test_each_half_computes_what_diffusers_computes_under_optimums_names(task, scheme, given, result, live, tmp_path):
    model, checkpoint = live
    export = plan_traced(checkpoint, checkpoint.config, scheme, task=task)
    assert (export.task, export.input_names, export.output_names) == (task, (given,), (result,))
    place = {"vae-encoder": "sample", "vae-decoder": "latent"}[task]
    (entry,) = export.graph.graph.inputs
    assert [str(axis) for axis in entry.shape] == ["batch_size", str(entry.shape[1]), f"{place}_height", f"{place}_width"]
    write_traced(export, checkpoint, tmp_path)
    for size in (0, 1):
        (x,) = export.subject.draw(size).values()
        with torch.inference_mode():
            wanted = model.encode(x).latent_dist.parameters if task == "vae-encoder" else model.decode(x).sample
        assert relative_error(run(tmp_path, {given: x})[result], wanted.numpy()) < {"fp32": 1e-5, "int8": 0.05}[scheme]
    assert check_traced(export, checkpoint, tmp_path).error_carried < {"fp32": 1e-5, "int8": 0.02}[scheme]
    other = "decoder." if task == "vae-encoder" else "encoder."
    assert not export.convolutions and not any(spec.name.startswith(other) for spec in export.plan.outputs)
    if scheme == "int8":
        assert "fp32, not int8: " in export.note and any(weight.form is not None for weight in export.weights.values())


@pytest.mark.parametrize("task", [None, "denoising"])
def test_a_half_must_be_named(task):
    with pytest.raises(UsageError, match="two halves") as caught:
        diffusion_subject({"_class_name": "AutoencoderKL", **SIZES}, task)
    assert "--task vae-encoder or --task vae-decoder" in caught.value.hint


def test_a_denoiser_has_one_task():
    with pytest.raises(UsageError, match="no model for `vae-decoder`"):
        diffusion_subject({"_class_name": "UNet2DModel"}, "vae-decoder")
