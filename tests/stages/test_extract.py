"""Extraction end to end on tiny models: what changed comes back through stock PEFT and through our own merge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.adapters.peft_files import WEIGHTS, read_adapter, write_config
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.writer import SafetensorsWriter
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError, UnsupportedError, UsageError
from qlora_tools.manifest import FILE_NAME, Manifest
from qlora_tools.stages.extract import ExtractConfig, Extraction, plan_extract
from qlora_tools.stages.extract_result import Extracted, finish
from tests.adapters.tiny_models import Convolutions, bert, forward, gpt2, llama

Change = Callable[[dict[str, torch.Tensor]], None]


@dataclass
class Pair:
    """A base folder and a tuned one whose difference the test decides."""

    base: Path
    tuned: Path

    def plan(self, **options: Any) -> Extraction:
        base, tuned = open_checkpoint(self.base), open_checkpoint(self.tuned)
        return plan_extract(base, tuned, base.family, ExtractConfig(**options), base_ties=base.ties, tuned_ties=tuned.ties)

    def extract(self, dest: Path | None = None, workers: int = 1, **options: Any) -> Extracted:
        """Extract, and with ``dest`` write the adapter folder."""
        base, tuned = open_checkpoint(self.base), open_checkpoint(self.tuned)
        extraction = self.plan(**options)
        result = finish(
            extraction, run(extraction.plan, {"base": base, "tuned": tuned}, workers=workers), tuned.specs, base_config=base.config, base_model=str(self.base)
        )
        if dest is not None:
            dest.mkdir()
            writer = SafetensorsWriter(dest / WEIGHTS, result.plan.outputs)
            run(result.plan, {"tuned": tuned}, writer, workers=workers)
            writer.close()
            write_config(dest, result.config)
            (dest / FILE_NAME).write_bytes(Manifest("adapter", {}, base_tensors=result.base_tensors).to_json())
        return result

    def merged(self, adapter: Path) -> MergedSource:
        base = open_checkpoint(self.base)
        return MergedSource(base, [(read_adapter(adapter, base.specs, base.family, ties=base.ties), 1.0)], ties=base.ties, fingerprint=base_fingerprint(base))


def pair(folder: Path, build: Callable[[], Any], change: Change, dtype: torch.dtype = torch.float32) -> Pair:
    for name in ("base", "tuned"):
        build().to(dtype).save_pretrained(folder / name)
    path = folder / "tuned" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return Pair(folder / "base", folder / "tuned")


def low_rank(*marks: str, rank: int = 3, size: float = 0.05) -> Change:
    """A change of exactly ``rank`` to every matrix whose name holds one of ``marks``."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(5)
        for name in sorted(weights):
            if any(mark in name for mark in marks) and weights[name].ndim >= 2:
                flat = weights[name].flatten(1)
                delta = torch.randn(flat.shape[0], rank, generator=generator) @ torch.randn(rank, flat.shape[1], generator=generator) * size
                weights[name] = (flat.float() + delta).reshape(weights[name].shape).to(weights[name].dtype)

    return change


def shifted(*marks: str) -> Change:
    """A full-rank change of every tensor whose name holds one of ``marks``."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(6)
        for name in sorted(weights):
            if any(mark in name for mark in marks):
                weights[name] = weights[name] + torch.randn(weights[name].shape, generator=generator).to(weights[name].dtype) * 0.05

    return change


def both(*changes: Change) -> Change:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for one in changes:
            one(weights)

    return change


def load_in_peft(model: Any, adapter: Path) -> PeftModel:
    """Stock PEFT, with every warning of it (missing keys, wrong shapes) an error but the one that a tied base deserves."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(model.eval(), adapter).eval()


def assert_merges_to_tuned(made: Pair, adapter: Path, tolerance: float = 2e-5) -> None:
    source, tuned = made.merged(adapter), load_file(made.tuned / "model.safetensors")
    for name in tuned:
        torch.testing.assert_close(source.read(name).float(), tuned[name].float(), atol=tolerance, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


LLAMA_CHANGES: Mapping[str, tuple[Change, dict[str, Any]]] = {
    "linears": (low_rank("_proj.weight"), {}),
    "some linears": (low_rank("layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"), {}),
    "all biases": (both(low_rank("_proj.weight"), shifted("_proj.bias")), {}),
    "a bias of an unchanged linear": (both(low_rank("q_proj.weight"), shifted("k_proj.bias")), {}),
    "norms": (both(low_rank("q_proj.weight"), shifted("layers.0.input_layernorm", "model.norm")), {}),
    "embedding": (both(low_rank("v_proj.weight"), shifted("embed_tokens")), {}),
    "head": (both(low_rank("v_proj.weight"), shifted("lm_head")), {}),
    "embedding and head as lora": (low_rank("v_proj.weight", "embed_tokens", "lm_head"), {"embeddings": "lora"}),
    "auto": (low_rank("_proj.weight", rank=2), {"rank": "auto"}),
    "energy": (low_rank("_proj.weight", rank=2), {"energy": 0.999999}),
    "bytes": (low_rank("q_proj.weight", rank=2), {"max_bytes": 10_000}),
}


@pytest.mark.parametrize("case", LLAMA_CHANGES)
def test_llama_comes_back_through_peft_and_through_our_merge(case: str, tmp_path: Path) -> None:
    change, options = LLAMA_CHANGES[case]
    made = pair(tmp_path, llama, change)
    made.extract(tmp_path / "adapter", **({"rank": 4} if not options.keys() & {"rank", "energy", "max_bytes"} else {}), **options)
    assert_merges_to_tuned(made, tmp_path / "adapter", 1e-4)
    model = llama()
    model.load_state_dict(load_file(made.tuned / "model.safetensors"))
    loaded = load_in_peft(llama(), tmp_path / "adapter")
    torch.testing.assert_close(forward(loaded), forward(model), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(forward(loaded.merge_and_unload()), forward(model), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("embeddings", ["full", "lora"])
def test_tied_embedding_changes_head_too_in_peft_and_stays_tied_in_our_merge(embeddings: str, tmp_path: Path) -> None:
    made = pair(tmp_path, lambda: llama(tied=True), low_rank("q_proj.weight", "embed_tokens"))
    assert "lm_head.weight" not in load_file(made.tuned / "model.safetensors")
    result = made.extract(tmp_path / "adapter", rank=4, embeddings=embeddings)
    assert result.config["ensure_weight_tying"]
    assert made.merged(tmp_path / "adapter").untied == ()
    assert_merges_to_tuned(made, tmp_path / "adapter")
    model = llama(tied=True)
    model.load_state_dict(load_file(made.tuned / "model.safetensors"), strict=False)
    torch.testing.assert_close(forward(load_in_peft(llama(tied=True), tmp_path / "adapter")), forward(model), atol=1e-4, rtol=1e-3)


def test_head_untied_by_the_fine_tune_is_saved_beside_the_embedding(tmp_path: Path) -> None:
    made = pair(tmp_path, lambda: llama(tied=True), low_rank("q_proj.weight"))
    untied = llama(tied=False)
    weights = load_file(made.tuned / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.1
    save_file(weights, made.tuned / "model.safetensors", metadata={"format": "pt"})
    (made.tuned / "config.json").write_text(json.dumps({**json.loads((made.tuned / "config.json").read_text()), "tie_word_embeddings": False}))
    result = made.extract(tmp_path / "adapter", rank=4)
    assert result.report.saved_whole == ("lm_head.weight",)
    assert made.merged(tmp_path / "adapter").untied == ("lm_head.weight",)
    untied.load_state_dict(weights)
    torch.testing.assert_close(forward(load_in_peft(llama(tied=True), tmp_path / "adapter")), forward(untied), atol=1e-4, rtol=1e-3)


def test_qwen2_biases_on_some_targets_only_are_saved_whole_and_merge_in_peft(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False)).eval()

    made = pair(tmp_path, build, both(low_rank("_proj.weight"), shifted("q_proj.bias", "k_proj.bias")))
    result = made.extract(tmp_path / "adapter", rank=4)
    assert (result.config["bias"], result.config["lora_bias"]) == ("all", False)
    assert_merges_to_tuned(made, tmp_path / "adapter")
    model = build()
    model.load_state_dict(load_file(made.tuned / "model.safetensors"))
    loaded = load_in_peft(build(), tmp_path / "adapter")
    torch.testing.assert_close(forward(loaded), forward(model), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(forward(loaded.merge_and_unload()), forward(model), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bare", [False, True])
def test_gpt2_transposed_weights_and_checkpoints_without_the_models_prefix(bare: bool, tmp_path: Path) -> None:
    made = pair(tmp_path, gpt2, both(low_rank("c_attn.weight", "c_proj.weight", "c_fc.weight"), shifted("c_attn.bias", "c_proj.bias", "c_fc.bias", "ln_f")))
    expected = gpt2()
    expected.load_state_dict(load_file(made.tuned / "model.safetensors"), strict=False)
    if bare:
        for folder in (made.base, made.tuned):
            weights = load_file(folder / "model.safetensors")
            save_file({name.removeprefix("transformer."): tensor for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    result = made.extract(tmp_path / "adapter", rank=4)
    assert result.config["fan_in_fan_out"] and result.config["lora_bias"]
    assert_merges_to_tuned(made, tmp_path / "adapter")
    loaded = load_in_peft(gpt2(), tmp_path / "adapter")
    torch.testing.assert_close(forward(loaded), forward(expected), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(forward(loaded.merge_and_unload()), forward(expected), atol=1e-4, rtol=1e-3)


def test_bert_layers_norms_and_position_embeddings(tmp_path: Path) -> None:
    made = pair(tmp_path, bert, both(low_rank("query.weight", "dense.weight"), shifted("LayerNorm", "position_embeddings")))
    made.extract(tmp_path / "adapter", rank=4)
    assert_merges_to_tuned(made, tmp_path / "adapter")
    model = bert().eval()
    model.load_state_dict(load_file(made.tuned / "model.safetensors"))
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(load_in_peft(bert(), tmp_path / "adapter")(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-4, rtol=1e-3)


def test_convolutions_become_convolution_factors(tmp_path: Path) -> None:
    made = pair(tmp_path, Convolutions, both(low_rank("weight", rank=2), shifted("bias")))
    result = made.extract(tmp_path / "adapter", rank=2)
    assert len(result.report.rows) == 4
    assert_merges_to_tuned(made, tmp_path / "adapter")
    live = load_in_peft(Convolutions(), tmp_path / "adapter").merge_and_unload()
    tuned = load_file(made.tuned / "model.safetensors")
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(tensor, tuned[name], atol=2e-5, rtol=1e-4)


def test_added_vocabulary_rows_are_saved_whole(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, low_rank("q_proj.weight"))
    weights = load_file(made.tuned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(3, 32)])
    save_file(weights, made.tuned / "model.safetensors", metadata={"format": "pt"})
    result = made.extract(tmp_path / "adapter", rank=4)
    assert set(result.report.saved_whole) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "resize_token_embeddings(64)" in result.report.notes[0]
    assert_merges_to_tuned(made, tmp_path / "adapter")
    grown = llama()
    grown.resize_token_embeddings(64)
    expected = llama()
    expected.resize_token_embeddings(64)
    expected.load_state_dict(weights)
    torch.testing.assert_close(forward(load_in_peft(grown, tmp_path / "adapter")), forward(expected), atol=1e-4, rtol=1e-3)


def test_unchanged_layers_are_omitted_and_counted(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, low_rank("layers.1.self_attn.q_proj.weight"))
    result = made.extract(tmp_path / "adapter", rank=4)
    assert result.report.frozen == 13 and len(result.report.rows) == 1
    assert result.config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert {spec.name.split(".lora_")[0] for spec in result.plan.outputs} == {"base_model.model.model.layers.1.self_attn.q_proj"}


def test_short_names_where_they_select_exactly_the_targets(tmp_path: Path) -> None:
    result = pair(tmp_path, llama, low_rank("q_proj.weight", "v_proj.weight")).extract(rank=4)
    assert result.config["target_modules"] == ["q_proj", "v_proj"]


def test_differing_ranks_stand_in_anchored_patterns_with_alpha_equal(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, both(low_rank("_proj.weight", rank=2), low_rank("layers.0.self_attn.q_proj.weight", rank=5)))
    result = made.extract(tmp_path / "adapter", energy=0.99999)
    assert result.config["rank_pattern"] == result.config["alpha_pattern"] and result.config["r"] == result.config["lora_alpha"]
    assert all(key.startswith("^") for key in result.config["rank_pattern"])
    live = load_in_peft(llama(), tmp_path / "adapter").base_model.model.model.layers[0].self_attn.q_proj
    assert live.r["default"] > 2 and live.scaling["default"] == 1.0


def test_untargeted_and_dropped_changes_are_listed_with_their_size(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, both(low_rank("_proj.weight"), shifted("up_proj.bias", "embed_tokens", "model.norm")))
    result = made.extract(rank=4, targets="attn", embeddings="drop", drop=(r"model\.norm",))
    listed = {item.name: item for item in result.report.dropped}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"} <= listed.keys()
    assert "lm_head.weight" not in listed
    before, after = load_file(made.base / "model.safetensors"), load_file(made.tuned / "model.safetensors")
    for name, item in listed.items():
        assert item.delta_norm == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-5) and item.reason


def experts(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(4, 8, 6)


def with_experts(folder: Path, factor: float) -> Pair:
    made = pair(folder, llama, low_rank("q_proj.weight"))
    for path, scale in ((made.base, 1.0), (made.tuned, factor)):
        weights = load_file(path / "model.safetensors")
        experts(weights)
        weights["model.layers.0.mlp.experts.gate_up_proj"] *= scale
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return made


def test_changed_expert_tensors_are_refused_by_name_unless_dropped(tmp_path: Path) -> None:
    made = with_experts(tmp_path, 1.5)
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj") as caught:
        made.extract(rank=4)
    assert "--drop" in (caught.value.hint or "")
    result = made.extract(rank=4, drop=("experts",))
    assert [item.name for item in result.report.dropped] == ["model.layers.0.mlp.experts.gate_up_proj"]


def test_unchanged_expert_tensors_do_not_matter(tmp_path: Path) -> None:
    assert with_experts(tmp_path, 1.0).extract(rank=4).report.dropped == ()


def test_certificates_hold_and_totals_add_up(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, both(low_rank("_proj.weight"), shifted("_proj.weight")), torch.bfloat16)
    result = made.extract(tmp_path / "adapter", rank=4)
    before, after, source = load_file(made.base / "model.safetensors"), load_file(made.tuned / "model.safetensors"), made.merged(tmp_path / "adapter")
    for row in result.report.rows:
        delta, got = after[row.name].double() - before[row.name].double(), source.read(row.name).double() - before[row.name].double()
        values = torch.linalg.svdvals(delta).square()
        best = float((values[4:].sum() / values.sum()).sqrt())
        assert row.certificate.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row.certificate.error == pytest.approx(float((delta - got).norm() / delta.norm()), abs=1e-5)
        assert row.certificate.optimum <= best + 1e-6 and row.certificate.error - best < 1e-3
        assert 0 < row.certificate.noise_norm < row.certificate.delta_norm
    assert result.report.total.delta_norm**2 == pytest.approx(sum(row.certificate.delta_norm**2 for row in result.report.rows))
    assert result.report.adapter_bytes == sum(spec.nbytes for spec in result.plan.outputs)


def test_adaptive_ranks_certify_the_cut_that_is_kept(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, both(low_rank("_proj.weight"), shifted("_proj.weight")))
    for options in ({"energy": 0.8}, {"max_bytes": 20_000}):
        result = made.extract(tmp_path / next(iter(options)), **options)
        before, after, source = (
            load_file(made.base / "model.safetensors"),
            load_file(made.tuned / "model.safetensors"),
            made.merged(tmp_path / next(iter(options))),
        )
        for row in result.report.rows:
            delta, got = after[row.name].double() - before[row.name].double(), source.read(row.name).double() - before[row.name].double()
            assert row.certificate.error == pytest.approx(float((delta - got).norm() / delta.norm()), abs=1e-5)
            if "energy" in options:
                assert row.certificate.kept_energy > 0.8 - 1e-4
        if "max_bytes" in options:
            assert 15_000 < result.report.adapter_bytes <= 20_000


def test_auto_rank_finds_the_planted_rank_in_bf16_checkpoints(tmp_path: Path) -> None:
    def build() -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4))

    made = pair(tmp_path, build, low_rank("q_proj.weight", "up_proj.weight", rank=3, size=2e-3), torch.bfloat16)
    assert {row.certificate.rank for row in made.extract(rank="auto").report.rows} == {3}


@pytest.mark.parametrize("options", [{"energy": 0.95}, {"rank": "auto"}, {"max_bytes": 10**6}])
def test_what_the_largest_rank_cuts_off_is_said(options: dict[str, Any], tmp_path: Path) -> None:
    made = pair(tmp_path, llama, both(low_rank("_proj.weight"), shifted("_proj.weight")))
    free, capped = made.extract(**options, max_rank=32).report, made.extract(**options, max_rank=2).report
    assert not free.notes and all(row.capped and row.certificate.rank == 2 for row in capped.rows) and "--max-rank" in capped.notes[0]


def test_same_inputs_give_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, both(low_rank("_proj.weight"), shifted("_proj.weight", "model.norm")))
    for name, workers in (("one", 1), ("three", 3)):
        made.extract(tmp_path / name, workers=workers, rank=4)
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()


def test_hashes_of_the_base_are_recorded_and_another_base_is_refused(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, low_rank("q_proj.weight"))
    result = made.extract(tmp_path / "adapter", rank=4)
    assert result.base_tensors == {
        name: open_checkpoint(made.base).sha256(name) for name in (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    }
    with pytest.raises(IncompatibleError, match="another base"):
        Pair(made.tuned, made.tuned).merged(tmp_path / "adapter")


class Unreadable:
    """A source whose headers may be seen and whose weights may not."""

    def __init__(self, folder: Path) -> None:
        self.specs = open_checkpoint(folder).specs

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def test_every_wrong_shape_is_in_one_error_before_any_read(tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] = torch.ones(31)
        weights["model.layers.0.self_attn.q_proj.weight"] = torch.ones(30, 32)
        weights["lm_head.weight"] = torch.ones(61, 33)

    made = pair(tmp_path, llama, change)
    with pytest.raises(IncompatibleError) as caught:
        plan_extract(Unreadable(made.base), Unreadable(made.tuned), open_checkpoint(made.base).family, ExtractConfig())
    for text in (
        "`model.norm.weight` is [31], base has [32]",
        "`model.layers.0.self_attn.q_proj.weight` is [30, 32], base has [32, 32]",
        "`lm_head.weight` is [61, 33]",
    ):
        assert text in str(caught.value)


def test_missing_and_extra_tensors_are_named_before_any_read(tmp_path: Path) -> None:
    made = pair(tmp_path / "missing", llama, lambda weights: weights.__delitem__("model.norm.weight"))
    with pytest.raises(MissingError, match=r"model\.norm\.weight"):
        made.plan()
    made = pair(tmp_path / "extra", llama, lambda weights: weights.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(IncompatibleError, match=r"model\.extra\.weight"):
        made.plan()


@pytest.mark.parametrize("rank", [17, 1000])
def test_rank_above_the_smaller_side_names_the_tensors_and_the_largest_rank(rank: int, tmp_path: Path) -> None:
    made = pair(tmp_path, llama, low_rank("q_proj.weight"))
    with pytest.raises(UsageError, match=r"k_proj\.weight") as caught:
        made.plan(rank=rank)
    assert "--rank 16" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": "all"},
        {"rank": 4, "energy": 0.5},
        {"energy": 0.0},
        {"energy": 1.5},
        {"max_bytes": 0},
        {"embeddings": "some"},
        {"dtype": "I8"},
        {"drop": ("(",)},
        {"max_rank": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExtractConfig(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_non_finite_values_are_named(value: float, name: str, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[1] = value

    made = pair(tmp_path, llama, both(low_rank("q_proj.weight"), change))
    with pytest.raises(NonFiniteError, match=f"`{name}` of the tuned model"):
        made.extract(rank=4)
    with pytest.raises(NonFiniteError, match=f"`{name}` of the base model"):
        Pair(made.tuned, made.base).extract(rank=4)


def test_identical_models_have_nothing_to_extract(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="no targeted linear differs"):
        pair(tmp_path, llama, lambda weights: None).extract(rank=4)


def test_budget_below_what_must_be_saved_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not hold"):
        pair(tmp_path, llama, both(low_rank("q_proj.weight"), shifted("embed_tokens"))).extract(max_bytes=1000)


def test_factors_take_the_dtype_asked_for(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, low_rank("q_proj.weight"), torch.bfloat16)
    assert {spec.dtype for spec in made.extract(rank=4).plan.outputs} == {"BF16"}
    assert {spec.dtype for spec in made.extract(rank=4, dtype="F32").plan.outputs} == {"F32"}
