"""Models that read with one half and write with the other: three graphs, called as a user calls them."""

from functools import lru_cache

import numpy as np
import onnxruntime as ort
import pytest
import torch

from qlora_tools.errors import CheckFailed, UnsupportedError
from qlora_tools.export.external import read_stored
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.traced.encoder_decoder import DECODER, ENCODER, WITH_PAST, encoder_decoder_subjects
from qlora_tools.export.traced.halves import check_halves, draw_halves, fill_halves, write_halves
from tests.export.tiny_decoders import MemorySource
from tests.export.traced.tiny_models import relative_error

WHISPER = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": 96, "d_model": 32, "encoder_layers": 1,
           "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
           "max_source_positions": 12, "max_target_positions": 24, "num_mel_bins": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 3, "is_encoder_decoder": True, "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
BART = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 40,
        "is_encoder_decoder": True}  # fmt: skip


@lru_cache
def whisper():
    """(live model, the same weights as a source, its graphs without weights)."""
    import transformers

    config = WHISPER
    owner = getattr(transformers, config["architectures"][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = owner._from_config(owner.config_class.from_dict(config)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (0 if parameter.ndim > 1 else 0.5))
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    source = MemorySource({name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied})
    return model, source, draw_halves(source, config)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(export, folder) of a scheme, made once."""

    @lru_cache
    def made(scheme):
        _, source, drawn = whisper()
        folder = tmp_path_factory.mktemp(scheme)
        export = fill_halves(drawn, source, scheme_of(scheme))
        write_halves(export, source, folder)
        return export, folder

    return made


def opened(folder, name):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])


def called(session, feeds):
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def written(folder, features, prompt, steps):
    """Tokens chosen greedily through the three graphs, and the logits they were chosen by."""
    states = called(opened(folder, ENCODER), {"input_features": features})["last_hidden_state"]
    found = called(opened(folder, DECODER), {"input_ids": prompt, "encoder_hidden_states": states})
    past = {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
    going_on, tokens, logits = opened(folder, WITH_PAST), [prompt], [found["logits"][:, -1]]
    for _ in range(steps):
        tokens.append(logits[-1].argmax(-1)[:, None])
        found = called(going_on, {"input_ids": tokens[-1], **past})
        past |= {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
        logits.append(found["logits"][:, -1])
    return np.concatenate(tokens, 1), np.stack(logits, 1)


@pytest.mark.parametrize(("scheme", "bound"), [("fp32", 1e-4), ("int8", 0.05)])
def test_whisper_writes_step_by_step_what_transformers_computes_at_once(exports, scheme, bound):
    model = whisper()[0]
    features = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(5))
    tokens, logits = written(exports(scheme)[1], features.numpy(), np.array([[3, 7], [3, 9]]), 4)
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=torch.from_numpy(tokens)).logits[:, 1:].numpy()
    assert relative_error(logits, expected) < bound


def test_parity_holds_every_graph_and_a_step_from_a_past(exports):
    export, folder = exports("int8")
    before = sorted(path.name for path in folder.iterdir())
    found = check_halves(export, whisper()[1], folder)
    assert found.error_carried < 0.05 and found.error_dense < 0.1 and found.sizes == 2
    assert sorted(path.name for path in folder.iterdir()) == before == sorted([*(f"{name}.onnx" for name in export.parts), *set(export.files.values())])


def test_both_graphs_that_write_share_one_file(exports):
    export, folder = exports("int8")
    assert export.files == {ENCODER: "encoder_model.onnx.data", DECODER: "decoder_model.onnx.data", WITH_PAST: "decoder_model.onnx.data"}
    assert export.file_bytes == sum((folder / name).stat().st_size for name in set(export.files.values()))
    decoder = {spec.name for spec in export.parts[DECODER].plan.outputs}
    assert {spec.name for spec in export.parts[WITH_PAST].plan.outputs} < decoder  # it never asks for the keys and values of what was read


def test_names_are_those_that_optimum_opens(exports):
    parts = exports("int8")[0].parts
    past = [f"0.{half}.{kind}" for half in ("decoder", "encoder") for kind in ("key", "value")]
    assert parts[ENCODER].input_names == ("input_features",) and parts[ENCODER].output_names == ("last_hidden_state",)
    assert parts[DECODER].input_names == ("input_ids", "encoder_hidden_states")
    assert parts[DECODER].output_names == ("logits", *(f"present.{name}" for name in past))
    assert parts[WITH_PAST].input_names == ("input_ids", *(f"past_key_values.{name}" for name in past))
    assert parts[WITH_PAST].output_names == ("logits", *(f"present.{name}" for name in past if "decoder" in name))
    assert exports("int8")[0].task == "automatic-speech-recognition"


def test_a_changed_byte_of_the_shared_file_fails_the_check(tmp_path):
    _, source, drawn = whisper()
    export = fill_halves(drawn, source, scheme_of("fp32"))
    write_halves(export, source, tmp_path)
    part = export.parts[WITH_PAST]
    spec = next(spec for spec in part.plan.outputs if spec.name == "model.decoder.layer_norm.weight")
    path = tmp_path / export.files[WITH_PAST]
    weight = read_stored(path, spec, part.offsets[spec.name], (0, spec.shape[0]))
    with path.open("r+b") as stream:
        stream.seek(part.offsets[spec.name])
        stream.write((weight * 3).numpy().tobytes())
    with pytest.raises(CheckFailed, match="logits"):
        check_halves(export, source, tmp_path)


def test_what_reads_text_takes_its_mask_in_every_half():
    subjects = encoder_decoder_subjects(BART)
    assert list(subjects[ENCODER].draw(1)) == ["input_ids", "attention_mask"]
    assert list(subjects[DECODER].draw(1)) == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    assert list(subjects[WITH_PAST].draw(1))[:3] == ["input_ids", "encoder_attention_mask", "past_key_values.0.decoder.key"]
    assert subjects[WITH_PAST].draw(1)["past_key_values.0.encoder.key"].shape == (3, 2, 9, 16)


def test_a_model_of_one_half_is_refused():
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    with pytest.raises(UnsupportedError, match="BertModel"):
        encoder_decoder_subjects(config)
