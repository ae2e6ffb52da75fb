"""`qlt generate`: an export's text is the model's own, comes as it is written, under adapters too; and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qlora_tools import api
from tests.conftest import write_tokenizer
from tests.export.runtime.small_graphs import adapted, factors, write_adapter, write_genai

PROMPT = "the cat"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, llama):
    output = tmp_path_factory.mktemp("exports") / "base-fp32"
    api.export(model=llama, scheme="fp32", output=output, verify=False)
    return output


def continued(llama, prompt, new):
    """What transformers writes greedily, as (text of all, text of the new tokens' end)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    return tokenizer.decode(done[ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False), done[ids.shape[1] :].tolist()


def test_the_text_is_what_transformers_writes(qlt, llama, exported):
    text, tokens = continued(llama, PROMPT, 20)
    assert 1 not in tokens, "the model ended its text; the comparison needs another seed"
    done = qlt("generate", exported, PROMPT, "--new", 20)
    assert done.code == 0 and done.out == text + "\n" and "20 tokens after 7 tokens of prompt, cut at --new" in done.err
    record = qlt("generate", exported, PROMPT, "--new", 20, "--json").json
    (answer,) = record["answers"]
    assert answer["text"] == text and answer["tokens"] == tokens and answer["finish"] == "length" and answer["adapter"] is None
    assert record["prompt_tokens"] == 7 and record["load_s"] > 0 and answer["first_token_s"] > 0 and answer["tokens_per_s"] > 0


def test_the_last_export_is_remembered(qlt, here, llama):
    assert qlt("export", llama, "--int8", "--no-verify").code == 0
    done = qlt("generate", PROMPT, "--new", 3)
    assert done.code == 0 and "using exports/base-int8" in done.err and done.out.endswith("\n")


def test_plain_onnx_whose_past_grows_writes_the_same(qlt, here, llama, exported):
    assert qlt("export", llama, "--fp32", "--standard", "-o", "plain", "--no-verify").code == 0
    config = json.loads((here / "plain/genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is False
    assert qlt("generate", "plain", PROMPT, "--new", 12).out == qlt("generate", exported, PROMPT, "--new", 12).out


def test_prompts_come_from_files_and_standard_input(qlt, here, exported, monkeypatch):
    import io
    import sys

    wanted = qlt("generate", exported, PROMPT, "--new", 5).out
    (here / "prompt.txt").write_text(PROMPT)
    assert qlt("generate", exported, "--file", "prompt.txt", "--new", 5).out == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert qlt("generate", exported, "-", "--new", 5).out == wanted


def test_text_comes_piece_by_piece_and_a_stop_text_ends_it(exported):
    heard = []
    whole = api.generate(model=exported, prompt=PROMPT, new_tokens=12, threads=1, listener=lambda adapter, piece: heard.append(piece)).answers[0]
    assert heard == list(whole.text) and len(heard) > 4  # this tokenizer's words are letters; the model also knows ids that are none
    stop = whole.text[2:4]
    cut = api.generate(model=exported, prompt=PROMPT, new_tokens=12, stop=[stop], threads=1).answers[0]
    assert cut.finish == "stop text" and cut.text == whole.text[: whole.text.index(stop)] and len(cut.tokens) < 12


def test_the_models_own_end_ends_it(tmp_path, exported):
    whole = api.generate(model=exported, prompt=PROMPT, new_tokens=6, threads=1).answers[0]
    folder = tmp_path / "ends"
    shutil.copytree(exported, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [whole.tokens[3]]}))
    first = whole.tokens.index(whole.tokens[3])
    cut = api.generate(model=folder, prompt=PROMPT, new_tokens=6, threads=1).answers[0]
    assert cut.finish == "stop" and cut.tokens == whole.tokens[:first]


def test_a_seed_draws_the_same_text_again(qlt, exported):
    words = ("generate", exported, PROMPT, "--new", 16, "--temperature", 1.5)
    texts = [qlt(*words, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert qlt(*words[:-1], 0).out == qlt(*words[:-2]).out  # no temperature: the likeliest


def test_sampling_starts_from_the_models_own_settings(tmp_path, exported):
    folder = tmp_path / "own"
    shutil.copytree(exported, folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    own = api.generate(model=folder, prompt=PROMPT, new_tokens=1, sample=True, top_k=4, seed=3, threads=1).sampling
    assert (own.temperature, own.top_p, own.top_k, own.seed) == (0.6, 0.9, 4, 3)
    drawn = api.generate(model=folder, prompt=PROMPT, new_tokens=1, top_k=4, threads=1).sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (1.0, 1.0, 4)
    assert api.generate(model=folder, prompt=PROMPT, new_tokens=1, repetition_penalty=1.1, threads=1).sampling.greedy


def test_the_context_cuts_where_no_position_is_left(exported):
    answer = api.generate(model=exported, prompt="a" * 120, new_tokens=50, threads=1).answers[0]
    assert answer.finish in ("context", "stop") and len(answer.tokens) <= 9  # 120 positions read, 8 more, and one token that is not read


def test_a_chat_goes_through_the_tokenizers_template(tmp_path, exported):
    folder = tmp_path / "chat"
    shutil.copytree(exported, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "<s>{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = api.generate(model=folder, prompt="<s>s:be brief;u:why?;a:", new_tokens=8, threads=1)
    chat = api.generate(model=folder, prompt="why?", system="be brief", chat=True, new_tokens=8, threads=1)
    assert chat.prompt_tokens == plain.prompt_tokens and chat.answers[0].text == plain.answers[0].text


def letters(folder):
    """A tokenizer of the letters a to g."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate("abcdefg")}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}))


@pytest.fixture
def adaptable(tmp_path):
    folder = adapted(tmp_path / "adaptable")
    letters(folder)
    write_genai(folder)
    for name, seed in (("poems", 2), ("code", 3)):
        write_adapter(folder / f"{name}.onnx_adapter", {key: array * 4 for key, array in factors(2, seed).items()})
    return folder


def test_adapters_answer_one_after_the_other(qlt, adaptable):
    words = ("generate", adaptable, "de", "--new", 6)
    alone = {name: qlt(*words, *(["--adapter", name] if name else [])).out for name in (None, "poems", "code")}
    assert len(set(alone.values())) == 3
    both = qlt(*words, "--adapter", "code", "--adapter", "poems")
    assert both.code == 0 and both.out == f"== code ==\n{alone['code'].rstrip()}\n\n== poems ==\n{alone['poems']}"
    by_path = qlt(*words, "--adapter", adaptable / "code.onnx_adapter", "--json").json
    assert by_path["answers"][0]["text"] + "\n" == alone["code"]


def test_a_kept_adapter_writes_what_peft_writes(qlt, here, llama, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    style = api.extract(base=llama, tuned=tuned, config=api.ExtractConfig(rank=6), output=here / "style").output
    assert qlt("export", llama, "--fp32", "--adapters", style, "-o", "e", "--no-verify").code == 0
    ids = AutoTokenizer.from_pretrained(llama)(PROMPT, return_tensors="pt")["input_ids"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), style)
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    record = qlt("generate", "e", PROMPT, "--new", 20, "--adapter", "style", "--json").json
    assert record["answers"][0]["tokens"] == written[0, ids.shape[1] :].tolist()
    assert record["answers"][0]["tokens"] != qlt("generate", "e", PROMPT, "--new", 20, "--json").json["answers"][0]["tokens"]
    judged = qlt("eval", "e", "--adapter", "style", "--against", "e", "--tokens", 64, "--context", 32, "--json").json["models"]
    assert [row["name"] for row in judged] == ["e", "e + style"] and judged[0]["figures"]["kl_mean"] == 0 < judged[1]["figures"]["kl_mean"]


def test_refusals_come_before_the_graph_is_loaded(qlt, here, llama, exported, adaptable, monkeypatch):
    from qlora_tools.verbs import generate

    def explode(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(generate, "DecoderSession", explode)
    bare = here / "bare"
    shutil.copytree(exported, bare)
    (bare / "tokenizer.json").unlink()
    other = here / "classifier"
    shutil.copytree(exported, other)
    manifest = json.loads((other / "qlt-manifest.json").read_text())
    (other / "qlt-manifest.json").write_text(json.dumps({**manifest, "command": {**manifest["command"], "task": "text-classification"}}))
    for words, code, message in [
        ((other, "x"), 2, "is an export for text-classification, which writes no text"),
        ((llama, "x"), 2, "is a checkpoint, not an export"),
        ((here / "nowhere", "x"), 9, "is no export: it holds no model.onnx"),
        ((bare, "x"), 9, "holds no tokenizer"),
        ((exported, "a" * 128), 2, "the prompt has 128 tokens, the model's context 128"),
        ((exported, "x", "--chat"), 2, "no chat template"),
        ((exported, "x", "--system", "y"), 2, "a system text belongs to a chat"),
        ((exported,), 2, "no prompt given"),
        (("x",), 2, "no exports given, and none remembered"),
        (("x", "y", "z"), 2, "3 words, at most 2"),
        ((exported, "x", "--adapter", "poems"), 9, "`poems` is neither an adapter of"),
        ((adaptable, "d", "--adapter", "prose"), 9, "it has code, poems"),
    ]:
        done = qlt("generate", *words)
        assert done.code == code and message in done.err and "hint: " in done.err, (words, done)


def test_a_tokenizer_of_a_larger_model_is_refused(qlt, adaptable):
    write_tokenizer(adaptable, 200)
    done = qlt("generate", adaptable, "de")
    assert done.code == 3 and "the model has 7" in done.err


def test_an_adapter_of_another_graph_is_refused(qlt, here, adaptable):
    write_adapter(here / "other.onnx_adapter", factors(2, matrix="tail"))
    done = qlt("generate", adaptable, "de", "--adapter", "other.onnx_adapter")
    assert done.code == 3 and "the graph has no input `tail.lora_A`" in done.err


def test_an_empty_prompt_begins_a_text_where_the_tokenizer_has_a_beginning(qlt, exported, adaptable):
    assert qlt("generate", exported, "", "--new", 2).code == 0
    assert "the prompt is empty" in qlt("generate", adaptable, "").err


def test_a_dry_run_checks_everything_and_writes_nothing(qlt, exported):
    done = qlt("generate", exported, PROMPT, "--dry-run")
    assert done.code == 0 and done.out == f"dry run: would continue 7 tokens with {exported} on cpu\n"
    assert qlt("generate", exported, "a" * 128, "--dry-run").code == 2
    assert qlt("generate", exported, PROMPT, "--dry-run", "--json").json["answers"] == []


def test_the_result_goes_into_a_file_too(qlt, here, exported):
    qlt("generate", exported, PROMPT, "--new", 2, "-o", "answer.json")
    assert json.loads((here / "answer.json").read_text())["prompt"] == PROMPT
