"""``qlt eval --task python-syntax``: how often checkpoints, adapters on a base, and exports write Python that parses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import MissingError, UsageError
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.prompts import Prompt, PromptSet, library_prompts, read_prompts
from qlora_tools.quality.syntax import SyntaxComparison, SyntaxShare, check_prompts, compare_syntax, syntax_share
from qlora_tools.verbs.candidates import Candidate, candidates_of
from qlora_tools.verbs.engines import open_engine, positions_of
from qlora_tools.verbs.reading import TOKENIZER_FILES


@dataclass(frozen=True)
class JudgedSyntax:
    """One model's continuations, and how it does against the first."""

    name: str
    result: SyntaxShare
    against: SyntaxComparison | None


@dataclass(frozen=True)
class SyntaxResult:
    """All models on the same prompts. ``skipped``: prompts passed over because some model's context is too short for them."""

    task: str
    prompts: str
    prompts_sha256: str
    n_prompts: int
    skipped: int
    new_tokens: int
    reference: str
    models: tuple[JudgedSyntax, ...]


def evaluate_syntax(
    *,
    models: Sequence[str | Path],
    adapters: Sequence[str | Path] = (),
    against: str | Path | None = None,
    text: Path | None = None,
    prompts: int = 100,
    new_tokens: int = 128,
    device: str = "auto",
    progress: Progress = SILENT,
) -> SyntaxResult:
    """Let every model continue the same Python functions greedily and count what parses; nothing written is ever run.

    ``adapters``: PEFT folders, each judged on the first model as one more candidate. ``against``: what the others are compared
    with, by default the first model. ``text``: prompts of the user's (``.jsonl``, ``.py``) in place of the standard library's.
    Tokenizers may differ: what is judged is text.

    Raises:
        MissingError: no such folder, or one without a tokenizer. UsageError: no prompt fits a model's context, or an adapter is
        to go on an export. And what reading prompts and adapters raises.
    """
    candidates = _with_reference(candidates_of(models, adapters, progress), against)
    words = [TokenizerWords(candidate.folder) for candidate in candidates]
    available = read_prompts(text) if text else library_prompts()
    chosen, skipped = _fitting(available, candidates, words, prompts, new_tokens)
    check_prompts(chosen)
    judged: list[JudgedSyntax] = []
    for candidate, spoken in zip(candidates, words, strict=True):
        engine = open_engine(candidate.folder, device, candidate.adapter)
        try:
            share = syntax_share(engine, spoken, chosen, new_tokens=new_tokens, progress=progress, title=f"python-syntax {candidate.name}")
        finally:
            engine.close()
        comparison = compare_syntax(candidate.name, share, judged[0].name, judged[0].result) if judged else None
        judged.append(JudgedSyntax(candidate.name, share, comparison))
    name, sha256 = available.name, PromptSet(available.name, tuple(chosen)).sha256
    return SyntaxResult("python-syntax", name, sha256, len(chosen), skipped, new_tokens, judged[0].name, tuple(judged))


class TokenizerWords:
    """A folder's tokenizer as the task speaks to it, and the tokens that end a text.

    Raises:
        MissingError: no tokenizer there.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise MissingError(f"{folder} holds no tokenizer, so no prompt can be read", hint="copy the model's tokenizer files into it")
        self._tokenizer = open_tokenizer(folder)
        self.stop = frozenset(_stop_ids(folder)) | ({self._tokenizer.eos_token_id} - {None})

    def ids(self, prompt: str) -> list[int]:
        """With whatever the tokenizer puts before a text, and without the end mark that some put after it."""
        ids = list(self._tokenizer(prompt, verbose=False)["input_ids"])
        while ids and ids[-1] in self.stop:
            ids.pop()
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Decoded as written: spaces are grammar here."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _stop_ids(folder: Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        found |= {value} if isinstance(value, int) else set(value) if isinstance(value, list) else set()
    return found


def _with_reference(candidates: list[Candidate], against: str | Path | None) -> list[Candidate]:
    """The reference in front, once."""
    if against is None:
        return candidates
    return [Candidate(str(against), resolve_model(str(against))), *(candidate for candidate in candidates if candidate.name != str(against))]


def _fitting(available: PromptSet, candidates: Sequence[Candidate], words: Sequence[TokenizerWords], count: int, new_tokens: int) -> tuple[list[Prompt], int]:
    """The first ``count`` prompts that leave every model room for the new tokens, and how many were passed over."""
    limits = [positions_of(candidate.folder) for candidate in candidates]
    chosen: list[Prompt] = []
    skipped = 0
    for prompt in available.prompts:
        if len(chosen) == count:
            break
        fits = all(limit is None or len(spoken.ids(prompt.text)) + new_tokens <= limit for limit, spoken in zip(limits, words, strict=True))
        if fits:
            chosen.append(prompt)
        else:
            skipped += 1
    if not chosen:
        shortest = min(limit for limit in limits if limit is not None)
        raise UsageError(f"no prompt of {available.name} leaves room for {new_tokens} new tokens in a context of {shortest}", hint="lower --new-tokens")
    return chosen, skipped
