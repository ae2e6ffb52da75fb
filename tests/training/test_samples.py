"""Samples equal transformers' own greedy search and leave no trace in the run."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_tools.errors import UsageError
from qlora_tools.training.samples import continue_text

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))


def reference(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=1, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["def f(x):", "a", "To be, or not to be"])
@pytest.mark.parametrize("which", ["model", "gpt2"])
def test_it_is_what_greedy_search_gives(request, tokenizer, which, prompt):
    subject = request.getfixturevalue(which)
    assert continue_text(subject, tokenizer, prompt, 12) == reference(subject, tokenizer, prompt, 12) != ""


def test_without_a_cache_it_is_the_same_text(gpt2, tokenizer, monkeypatch):
    wanted = continue_text(gpt2, tokenizer, "abc", 8)
    forward = gpt2.forward

    def forgetful(*, past_key_values, use_cache, **inputs):
        assert past_key_values is None
        answer = forward(use_cache=False, **inputs)
        answer.past_key_values = None
        return answer

    monkeypatch.setattr(gpt2, "forward", forgetful)
    assert continue_text(gpt2, tokenizer, "abc", 8) == wanted


def test_modes_and_random_states_are_as_before(gpt2, tokenizer):
    gpt2.train()
    gpt2.transformer.h[1].eval()
    modes, state = [module.training for module in gpt2.modules()], torch.get_rng_state()
    first = continue_text(gpt2, tokenizer, "abc", 6)
    assert [module.training for module in gpt2.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert continue_text(gpt2, tokenizer, "abc", 6) == first, "dropout was on"


def test_the_random_state_survives_a_model_that_draws(model, tokenizer, monkeypatch):
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (torch.rand(3), forward(**inputs))[1])
    state = torch.get_rng_state()
    continue_text(model, tokenizer, "abc", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_exception_restores_the_modes(model, tokenizer, monkeypatch):
    model.train()
    monkeypatch.setattr(model, "forward", lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        continue_text(model, tokenizer, "abc", 3)
    assert all(module.training for module in model.modules())


def test_no_gradient_is_recorded_and_gradients_stay(model, tokenizer):
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    before = model.lm_head.weight.grad.clone()
    continue_text(model, tokenizer, "abc", 3)
    assert torch.equal(model.lm_head.weight.grad, before)


def test_leftovers_of_generation_settings_do_not_matter(model, tokenizer):
    wanted = continue_text(model, tokenizer, "abc", 6)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.num_beams, settings.max_length = False, 7.0, -3, 0, 1
    settings.repetition_penalty, settings.forced_bos_token_id = "strong", 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert continue_text(model, tokenizer, "abc", 6) == wanted


@pytest.mark.parametrize("several", [False, True])
def test_it_stops_at_an_end_that_the_model_names(model, tokenizer, several):
    text = continue_text(model, tokenizer, "abc", 6)
    second = tokenizer(text[1]).input_ids[0]
    assert text[0] != text[1]
    model.generation_config.eos_token_id = [97, second] if several else second
    assert continue_text(model, tokenizer, "abc", 6) == text[0]


def test_it_stops_at_the_end_of_the_tokenizer(model, tokenizer, monkeypatch):
    model.generation_config.eos_token_id = None
    forward = model.forward

    def ending(**inputs):
        answer = forward(**inputs)
        answer.logits[..., tokenizer.eos_token_id] = 1e4
        return answer

    monkeypatch.setattr(model, "forward", ending)
    assert continue_text(model, tokenizer, "abc", 6) == ""


def test_a_long_prompt_keeps_its_end_and_the_context_is_not_exceeded(gpt2, tokenizer):
    text = continue_text(gpt2, tokenizer, "x" * 100 + "abc", 30)
    assert text == continue_text(gpt2, tokenizer, "x" * 7 + "abc", 30)
    assert len(continue_text(gpt2, tokenizer, "abc", 500)) > 0


def test_zero_tokens_are_no_text(model, tokenizer):
    assert continue_text(model, tokenizer, "abc", 0) == ""


def test_messages_go_through_the_chat_template(model, tokenizer, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (seen.append(tokenizer.decode(inputs["input_ids"][0])), forward(**inputs))[1])
    continue_text(model, tokenizer, "hi", 1, chat=True)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    continue_text(model, tokenizer, "hi", 1, chat=True)
    continue_text(model, tokenizer, "hi", 1, chat=False)
    assert seen == ["hi", "<user>hi<assistant>", "hi"]


def test_an_empty_prompt_begins_a_text_or_says_what_is_missing(model, tokenizer):
    assert continue_text(model, tokenizer, "", 3) != ""

    def bare(text):
        return {"input_ids": tokenizer(text)["input_ids"]}

    with pytest.raises(UsageError, match="prompt is empty"):
        continue_text(model, bare, "", 3)


def test_an_adapter_wrapper_is_sampled_like_its_model(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    wanted = continue_text(model, tokenizer, "abc", 6)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    assert continue_text(wrapped, tokenizer, "abc", 6) == wanted
    assert sum(module.training for module in wrapped.modules()) == sum(1 for _ in wrapped.modules())


@pytest.mark.gpu
def test_the_cuda_random_state_is_as_before(model, tokenizer):
    model.cuda()
    state = torch.cuda.get_rng_state()
    continue_text(model, tokenizer, "abc", 6)
    assert torch.equal(torch.cuda.get_rng_state(), state)
