from __future__ import annotations

import pytest

from qlora_tools.adapters.formats import sgm
from tests.adapters.formats.tiny_images import modules_of, sd1, sdxl


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (
            sd1,
            {
                "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
                "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
                "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
                "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
                "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
            },
        ),
        (
            sdxl,
            {
                "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
                "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
                "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
                "add_embedding.linear_2": "label_emb.0.2",
            },
        ),
    ],
)
def test_names_of_the_published_checkpoints(model, pairs):
    research = {module: spelling for spelling, module in sgm.spellings(modules_of(model()))}
    assert {module: research[module] for module in pairs} == pairs


def test_known_modules_hold_those_of_both_models_and_nothing_for_others():
    known = set(sgm.known_modules("unet"))
    assert known >= set(modules_of(sd1())) and known >= set(modules_of(sdxl())) and known >= set(sgm.sdxl_modules())
    assert sgm.known_modules("transformer") == ()


def test_one_spelling_never_means_two_modules():
    for modules, mixed in ((sgm.known_modules("unet"), True), (sgm.sdxl_modules(), False)):
        spelled = [spelling for spelling, _ in sgm.spellings(modules, mixed=mixed)]
        assert len(spelled) == len(set(spelled))
