"""What a run learns from: records, tokenizer and task brought together into numbered rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.live.images import read_preparation
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.progress import Progress
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.examples import Records, read_records
from qlora_tools.training.images import ImageRecords, ImageRows, read_images
from qlora_tools.training.masks import Encoded, EncodeReport, encode, encode_labelled, preview
from qlora_tools.training.rows import LabelledRows, LanguageRows, Rows, pad_id_of, split

_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to train on and rows held out, with what is told about them. ``labels``: class names, for tasks that have classes."""

    task: str
    rows: Rows
    held_out: Rows | None
    report: EncodeReport
    preview: tuple[tuple[str, bool], ...]
    labels: tuple[str, ...]
    tokenizer: Any
    chat: bool


def prepare(checkpoint: LogicalCheckpoint, data: Path, val: Path | None, config: TrainConfig, progress: Progress) -> Data:
    """Read and encode ``data`` (and ``val``, or a held-out share of ``data``) for the task that config and data say.

    Raises:
        MissingError, CorruptError: files that are not there or not what they claim. UsageError, IncompatibleError: data, task and
        base do not belong together.
    """
    config = replace(config, max_len=_context(checkpoint, config, progress))
    records = open_examples(data)
    task = _task(config, records)
    held = open_examples(val) if val is not None else None
    if held is not None and _task(config, held) != task:
        raise UsageError(f"{val} holds data of another task than {data}", hint="give both in the same form")
    if held is None and config.val_share:
        records, held = split(records, config.val_share, config.seed)
    if isinstance(records, ImageRecords):
        return _images(checkpoint, records, held)
    tokenizer = open_tokenizer(checkpoint.folder)
    if task == "classification":
        return _labelled(checkpoint, records, held, tokenizer, config, progress)
    return _language(records, held, tokenizer, config, progress)


def open_examples(path: Path) -> Any:
    """Records of a file or a datasets folder, or images in folders of their classes."""
    if path.is_dir() and not any((path / mark).exists() for mark in _DATASET_MARKS):
        return read_images(path)
    return read_records(path)


def _task(config: TrainConfig, records: Any) -> str:
    found = "image" if isinstance(records, ImageRecords) else "classification" if records.kind == "labelled" else "language"
    if config.task not in ("auto", found):
        raise UsageError(f"--task {config.task}, but the data are for the task {found}", hint="leave out --task, or give other data")
    return found


def _context(checkpoint: LogicalCheckpoint, config: TrainConfig, progress: Progress) -> int:
    """``max_len``, no longer than the model's positions."""
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    if isinstance(limit, int) and 1 < limit < config.max_len:
        progress.note(f"examples are cut at {limit} tokens, the model's context (--max-len {config.max_len})")
        return limit
    return config.max_len


def _language(records: Records, held: Records | None, tokenizer: Any, config: TrainConfig, progress: Progress) -> Data:
    def rows(encoded: Encoded) -> LanguageRows:
        return LanguageRows(encoded.examples, max_len=config.max_len, pack=config.pack, pad_id=pad_id_of(tokenizer))

    encoded = encode(records, tokenizer, mask=config.mask, max_len=config.max_len, progress=progress)
    held_rows = None if held is None else rows(encode(held, tokenizer, mask=config.mask, max_len=config.max_len, progress=progress))
    shown = tuple(preview(encoded.examples[0], tokenizer))
    _tell(encoded.report, progress)
    return Data("language", rows(encoded), held_rows, encoded.report, shown, (), tokenizer, records.kind == "messages")


def _labelled(checkpoint: LogicalCheckpoint, records: Records, held: Records | None, tokenizer: Any, config: TrainConfig, progress: Progress) -> Data:
    encoded = encode_labelled(records, tokenizer, max_len=config.max_len, progress=progress)
    rows = LabelledRows(encoded.examples, pad_id=pad_id_of(tokenizer), id2label=_known_labels(checkpoint))
    held_rows = None
    if held is not None:
        examples = encode_labelled(held, tokenizer, max_len=config.max_len, progress=progress).examples
        held_rows = LabelledRows(examples, pad_id=pad_id_of(tokenizer), id2label=dict(enumerate(rows.names)))
    shown = tuple(preview(encoded.examples[0], tokenizer))
    _tell(encoded.report, progress)
    return Data("classification", rows, held_rows, encoded.report, shown, rows.names, tokenizer, False)


def _images(checkpoint: LogicalCheckpoint, records: ImageRecords, held: ImageRecords | None) -> Data:
    preparation = read_preparation(checkpoint.folder)
    rows = ImageRows(records, preparation, id2label=_known_labels(checkpoint))
    held_rows = None if held is None else ImageRows(held, preparation, id2label=dict(enumerate(rows.names)))
    report = EncodeReport("image", "label", len(rows), len(rows), len(rows), 1)
    return Data("image", rows, held_rows, report, (), rows.names, None, False)


def _known_labels(checkpoint: LogicalCheckpoint) -> dict[int, str] | None:
    """The classes of a base that has a head for them already."""
    found = checkpoint.config.get("id2label")
    heads = [name for name in checkpoint.specs if checkpoint.family.role(name.rpartition(".")[0]) == "head"]
    if not isinstance(found, dict) or not heads or not str((checkpoint.config.get("architectures") or [""])[0]).endswith("Classification"):
        return None
    try:
        return {int(number): str(name) for number, name in found.items()}
    except ValueError as error:
        raise IncompatibleError(f"{checkpoint.folder}/config.json: id2label has keys that are not numbers", hint="repair config.json") from error


def _tell(report: EncodeReport, progress: Progress) -> None:
    for count, lines, what in ((report.truncated, report.truncated_lines, "cut"), (report.dropped, report.dropped_lines, "dropped")):
        if count:
            progress.note(
                f"{count} of {report.examples + report.dropped} examples were {what}: too long (line{_plural(lines)} {', '.join(map(str, lines))}{' ...' if count > len(lines) else ''})"
            )
    for note in report.notes:
        progress.note(note)


def _plural(lines: Sequence[int]) -> str:
    return "s" if len(lines) > 1 else ""
