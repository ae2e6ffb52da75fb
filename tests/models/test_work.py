"""What a model does, from its config alone."""

import pytest

from qlora_tools.errors import UnsupportedError
from qlora_tools.models.work import inputs_of_class, inputs_of_denoiser, work_of


@pytest.mark.parametrize(
    ("config", "work"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "decoder"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "decoder"),
        ({"model_type": "llama"}, "decoder"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "forward"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "forward"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "forward"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "forward"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "forward"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}, "forward"),
        ({"_class_name": "UNet2DModel"}, "forward"),
    ],
)
def test_work_is_told_from_the_class(config, work):
    assert work_of(config) == work


def test_what_an_export_says_of_itself_counts_first():
    assert work_of({"architectures": ["LlamaForCausalLM"]}, "feature-extraction") == "forward"
    assert work_of({"architectures": ["BertForMaskedLM"]}, "text-generation") == "decoder"


def test_a_class_is_fed_what_its_forward_reads_and_its_config_has():
    parameters = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels")
    assert inputs_of_class({"type_vocab_size": 2}, "input_ids", parameters) == ("input_ids", "attention_mask", "token_type_ids")
    assert inputs_of_class({"type_vocab_size": 1}, "input_ids", parameters) == ("input_ids", "attention_mask")
    assert inputs_of_class({}, "pixel_values", ("pixel_values", "attention_mask", "labels")) == ("pixel_values",)
    assert inputs_of_class({"is_encoder_decoder": True}, "input_ids", ("input_ids", "decoder_input_ids")) == ("input_ids", "decoder_input_ids")
    with pytest.raises(UnsupportedError, match="pixel_values_videos"):
        inputs_of_class({}, "pixel_values_videos", ("pixel_values_videos",))


def test_a_denoiser_is_fed_what_its_config_asks_for():
    assert inputs_of_denoiser({"_class_name": "UNet2DModel"}) == ("sample", "timestep")
    full = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "time_cond_proj_dim": 4, "num_class_embeds": 3}
    assert inputs_of_denoiser(full) == ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond", "class_labels")
