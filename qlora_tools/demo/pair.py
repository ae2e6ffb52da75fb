"""The demo's two models: a base trained from scratch on Python source, and a full fine-tune of it on prose about Python.

Both are ordinary Hugging Face folders of the Llama architecture (bf16 safetensors, tied head, grouped-query
attention), with every width a multiple of 64. The fine-tune moves all weights a little, at full rank, as real
fine-tunes do. The pair is kept: a second call with the same recipe, seed and texts returns what is there.

    folder/base/  folder/tuned/  folder/prose.txt  folder/heldout-prose.txt  folder/heldout-code.txt  folder/qlt-manifest.json
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.checkpoint.folder import output_folder, seal
from qlora_tools.checkpoint.writer import CheckpointWriter
from qlora_tools.demo.corpus import Corpus, code_corpus, joined, prose_corpus
from qlora_tools.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, pack, save_tokenizer, train_tokenizer
from qlora_tools.demo.training import Schedule, perplexity, train
from qlora_tools.errors import OutputExistsError, UsageError
from qlora_tools.manifest import Manifest, read_manifest, sha256_file
from qlora_tools.progress import SILENT, Progress
from qlora_tools.specs import spec_of

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_KIND = "demo-pair"
_BASE, _TUNED, _TRAINED_ON, _PROSE, _CODE = "base", "tuned", "prose.txt", "heldout-prose.txt", "heldout-code.txt"


@dataclass(frozen=True)
class Recipe:
    """Shape of the model and both schedules. Heads are 64 wide."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    pretrain: Schedule
    finetune: Schedule
    tokenizer_bytes: int = 3_000_000
    eval_windows: int = 40
    positions: int = 1024

    def scaled(self, factor: float) -> Recipe:
        """The same with ``factor`` times the steps of both schedules, at least one each."""
        if not factor > 0:
            raise UsageError(f"the factor on training steps is {factor}, expected more than 0")
        pretrain, finetune = (replace(schedule, steps=max(1, round(schedule.steps * factor))) for schedule in (self.pretrain, self.finetune))
        return replace(self, pretrain=pretrain, finetune=finetune)


STANDARD = Recipe(
    vocab_size=4096,
    hidden=256,
    layers=3,
    heads=4,
    kv_heads=2,
    feed_forward=704,
    pretrain=Schedule(steps=560, batch=4, context=256, kind="muon", rate=4e-2, matrix_rate=3e-2),
    finetune=Schedule(steps=180, batch=4, context=256, rate=1.5e-4),
)
"""About a minute on two cores."""

TINY = Recipe(
    vocab_size=512,
    hidden=128,
    layers=2,
    heads=2,
    kv_heads=1,
    feed_forward=192,
    pretrain=Schedule(steps=20, batch=2, context=64, kind="muon", rate=1e-2, matrix_rate=2e-2),
    finetune=Schedule(steps=10, batch=2, context=64, rate=1e-3),
    tokenizer_bytes=300_000,
    eval_windows=8,
)
"""A few seconds; for tests."""


@dataclass(frozen=True)
class Scores:
    """Held-out perplexities per token (fp32 arithmetic on the stored bf16 weights), and how far the fine-tune went."""

    base_code: float
    base_prose: float
    tuned_code: float
    tuned_prose: float
    delta_share: float  # mean over the layers' matrices of ||tuned - base|| / ||base||, Frobenius


@dataclass(frozen=True)
class Pair:
    """Where everything is. ``prose`` is what the fine-tune learnt from, and ``finetune`` how. ``reused``: nothing was trained this time."""

    base: Path
    tuned: Path
    prose: Path
    finetune: Schedule
    heldout_prose: Path
    heldout_code: Path
    scores: Scores
    reused: bool


def make_pair(
    folder: Path, *, recipe: Recipe = STANDARD, steps_scale: float = 1.0, seed: int = 0, stdlib: Path | None = None, progress: Progress = SILENT
) -> Pair:
    """Train the pair into ``folder``, which belongs to this function alone, or return the one that is there.

    ``steps_scale`` shortens or lengthens the training; ``stdlib`` is the folder of Python source to learn from
    (default: the running Python's). A pair of another recipe in ``folder`` is replaced.

    Raises:
        MissingError: no source of the standard library or no language reference. OutputExistsError: ``folder``
        holds something else. StorageError: not writable.
    """
    recipe = recipe.scaled(steps_scale)
    code, prose = code_corpus(stdlib), prose_corpus()
    command = {"recipe": asdict(recipe), "seed": seed, "texts": [_TRAINED_ON, _PROSE, _CODE]}
    inputs = {corpus.domain: {"name": corpus.domain, "sha256": corpus.sha256()} for corpus in (code, prose)}
    if found := _existing(folder, recipe, command, inputs):
        return found
    with output_folder(folder, force=True) as partial:
        scores = _train_pair(partial, recipe, code, prose, seed, progress)
        seal(partial, Manifest(kind=_KIND, command=command, inputs=inputs, report=asdict(scores)))
    return _pair(folder, recipe, scores, reused=False)


def _existing(folder: Path, recipe: Recipe, command: dict[str, Any], inputs: dict[str, dict[str, str]]) -> Pair | None:
    """The finished pair in ``folder`` if it is the wanted one and whole; ``None`` if ``folder`` is free or holds another pair."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if manifest.kind != _KIND:
        raise OutputExistsError(f"{folder} holds a {manifest.kind}, not a pair of demo models", hint="choose another folder")
    if manifest.command != command or manifest.inputs != inputs:
        return None
    for name, facts in manifest.files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != facts["sha256"]:
            return None
    return _pair(folder, recipe, Scores(**manifest.report), reused=True)


def _pair(folder: Path, recipe: Recipe, scores: Scores, *, reused: bool) -> Pair:
    return Pair(folder / _BASE, folder / _TUNED, folder / _TRAINED_ON, recipe.finetune, folder / _PROSE, folder / _CODE, scores, reused)


def _train_pair(folder: Path, recipe: Recipe, code: Corpus, prose: Corpus, seed: int, progress: Progress) -> Scores:
    with progress.task("tokenizing", 1, "tokenizer") as task:
        tokenizer = train_tokenizer((*code.train, *prose.train), vocab_size=recipe.vocab_size, sample_bytes=recipe.tokenizer_bytes)
        # All of the code, though training sees about a fifth: windows from every file teach more than every window of some files.
        code_ids, prose_ids = pack(tokenizer, code.train), pack(tokenizer, prose.train)
        heldout = {corpus.domain: pack(tokenizer, corpus.heldout) for corpus in (code, prose)}
        task.advance(1, f"{recipe.vocab_size} tokens")
    (folder / _TRAINED_ON).write_text(joined(prose.train), encoding="utf-8")
    for name, corpus in ((_PROSE, prose), (_CODE, code)):
        (folder / name).write_text(joined(corpus.heldout), encoding="utf-8")

    model = _new_model(recipe, seed)
    train(model, code_ids, recipe.pretrain, seed=seed, title="training base", progress=progress)
    base = _store(model, tokenizer, folder / _BASE)
    base_scores = _heldout_perplexities(model, heldout, recipe)
    train(model, prose_ids, recipe.finetune, seed=seed + 1, title="training tuned", progress=progress)
    tuned = _store(model, tokenizer, folder / _TUNED)
    tuned_scores = _heldout_perplexities(model, heldout, recipe)
    return Scores(base_scores["code"], base_scores["prose"], tuned_scores["code"], tuned_scores["prose"], _delta_share(base, tuned))


def _new_model(recipe: Recipe, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=64,
        max_position_embeddings=recipe.positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _store(model: Any, tokenizer: Tokenizer, folder: Path) -> dict[str, torch.Tensor]:
    """Write the model as a Hugging Face folder and round its weights to what was written (bf16); returns the stored tensors."""
    import torch

    folder.mkdir()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    stored = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}  # a tied head is listed once
    with CheckpointWriter(folder, [spec_of(name, tensor) for name, tensor in stored.items()]) as writer:
        for name, tensor in stored.items():
            writer.write(name, tensor)
    config = type(model.config).from_dict(model.config.to_dict() | {"dtype": "bfloat16", "architectures": [type(model).__name__]})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return stored


def _heldout_perplexities(model: Any, heldout: dict[str, list[int]], recipe: Recipe) -> dict[str, float]:
    return {domain: perplexity(model, ids, context=recipe.pretrain.context, windows=recipe.eval_windows) for domain, ids in heldout.items()}


def _delta_share(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> float:
    shares: list[float] = [
        ((tuned[name].float() - base[name].float()).norm() / base[name].float().norm()).item() for name in base if base[name].ndim == 2 and ".layers." in name
    ]
    return sum(shares) / len(shares)
