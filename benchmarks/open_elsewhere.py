"""Do exported folders open in other programs, as they are, and say the same? onnxruntime-genai, Optimum's ORTModel classes and transformers.js.

    python benchmarks/open_elsewhere.py [--model DIR] [--families llama,qwen3,...] [--genai-python PATH] [--optimum-python PATH] [--js DIR]

For every family a tiny random model is made with transformers (and ``--model`` is one more, a real one), exported as fp32, int8, int4 and fp32 ``--standard``, and opened in each program, which
continues a prompt of 20 tokens by 16, greedily. ``equal`` to ours: the same tokens as this package's runtime; fp32 is held against transformers' own continuation too, in Optimum also
that of a prompt padded on the left, which only ``--standard`` graphs can tell from a longer one.
Encoders (BERT with a classification head, BERT alone, ViT) are exported the same way and their outputs compared with transformers'. Nothing is renamed or edited in the folder:
Optimum takes it as ``from_pretrained(folder)``, genai as ``og.Model(folder)``, transformers.js in Node as ``from_pretrained(name, {subfolder: "", dtype: "fp32"})`` (its
``dtype`` only picks the file's suffix, and ours has none).

``--js`` is a folder with ``node_modules/@huggingface/transformers``. What is not given is made on first use (``peers.py``); without Node that row says so. Writes
``benchmarks/results/open_elsewhere.json``: one row per folder and program, with the reason where it did not open. About 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from graphs import open_ours
from measured import public_arguments, write_result
from peers import js_of, python_of, versions_of
from synthetic import write_tokenizer

from qlora_tools import api
from qlora_tools.errors import QltError

PROMPT, NEW = 20, 16
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"scheme": "fp32"},
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4"},
    "fp32 standard": {"scheme": "fp32", "standard": True},
}
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: What each family's config has beyond the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "smollm3": {},
    "olmo2": {},
    "granite": {},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 512},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}
ENCODERS = ("bert-classification", "bert", "vit")

#: Each program gets the folders, the prompt and the number of new tokens, and answers one line of JSON per folder.
GENAI = """
import json, sys, numpy, onnxruntime_genai as og
folders, ids, new = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])

def tokens(folder):
    model = og.Model(folder)
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + new, do_sample=False)
    generator, found = og.Generator(model, settings), []
    generator.append_tokens(numpy.asarray(ids, numpy.int32))
    while not generator.is_done() and len(found) < new:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return {"tokens": found}

for folder in folders:
    try:
        answer = tokens(folder)
    except Exception as error:
        answer = {"error": str(error)}
    print("ANSWER" + json.dumps(answer), flush=True)
"""
OPTIMUM = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
folders, prompt, new = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
ids = torch.tensor([prompt, [0] * 6 + prompt[6:]])  # the second is shorter and padded on the left
mask = torch.ones_like(ids)
mask[1, :6] = 0

def tokens(folder):
    model = ORTModelForCausalLM.from_pretrained(folder)
    out = [model.generate(ids[rows], attention_mask=mask[rows], max_new_tokens=new, do_sample=False, pad_token_id=0)[:, ids.shape[1]:].tolist() for rows in ([0], [0, 1])]
    return {"tokens": out[0][0], "padded": out[1][1]}

for folder in folders:
    try:
        answer = tokens(folder)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("ANSWER" + json.dumps(answer), flush=True)
"""
OPTIMUM_ENCODER = """
import json, sys, torch
import optimum.onnxruntime as classes
folder, name, output, shape = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
model = getattr(classes, name).from_pretrained(folder)
given = torch.arange(torch.Size(shape).numel()).reshape(shape)
feeds = {"pixel_values": given / given.numel()} if len(shape) == 4 else {"input_ids": 3 + given % 400, "attention_mask": torch.ones_like(given)}
print("ANSWER" + json.dumps({"values": model(**feeds)[output].flatten().tolist()}))
"""
JAVASCRIPT = """
import { AutoModelForCausalLM, Tensor, env } from '@huggingface/transformers';
const [root, names, prompt, count] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const ids = JSON.parse(prompt).map(BigInt);
const tensor = (values) => new Tensor('int64', BigInt64Array.from(values), [1, values.length]);
for (const name of JSON.parse(names)) {
  let answer;
  try {
    const model = await AutoModelForCausalLM.from_pretrained(name, { subfolder: '', dtype: 'fp32', device: 'cpu' });
    const out = await model.generate({ inputs: tensor(ids), attention_mask: tensor(ids.map((_) => 1n)), max_new_tokens: Number(count), do_sample: false });
    answer = { tokens: out.tolist()[0].slice(ids.length).map(Number) };
  } catch (error) {
    answer = { error: String(error) };
  }
  console.log('ANSWER' + JSON.stringify(answer));
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a real decoder, one more row")
    parser.add_argument("--families", default=",".join((*FAMILIES, *ENCODERS)))
    parser.add_argument("--genai-python", type=Path)
    parser.add_argument("--optimum-python", type=Path)
    parser.add_argument("--js", type=Path, help="folder with node_modules/@huggingface/transformers")
    options = parser.parse_args()
    programs = {"genai": python_of("genai", options.genai_python), "optimum": python_of("optimum", options.optimum_python)}
    js, rows = js_of(options.js), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as text:
        work = Path(text)
        for family in options.families.split(","):
            folder = work / family
            made = encoder_rows(folder, family, programs) if family in ENCODERS else decoder_rows(make_decoder(folder, family), family, programs, js)
            rows += shown(made)
            shutil.rmtree(folder, ignore_errors=True)
        if options.model:
            rows += shown(decoder_rows(options.model.resolve(), options.model.name, programs, js, beside=work))
    peer = {
        "genai": versions_of(programs["genai"], "onnxruntime-genai"),
        "optimum": versions_of(programs["optimum"], "optimum-onnx", "optimum", "transformers"),
    }
    peer["transformers.js"] = js_versions(js)
    print("wrote", write_result("open_elsewhere", f"python benchmarks/open_elsewhere.py {public_arguments()}", {"rows": rows, "peer": peer}))


def shown(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        opened = "opened" if row["opened"] else "NOT OPENED"
        print(f"{row['model']:<20} {row['scheme']:<14} {row['program']:<32} {opened:<11} {said(row)}", flush=True)
        yield row


def said(row: dict[str, Any]) -> str:
    if not row["opened"]:
        return str(row["reason"])
    if "error" in row:
        return f"error {row['error']:.1e}"
    words = [f"{row['equal']} of {row['tokens']} tokens as ours"]
    words += [f"{row['equal_transformers']} as transformers'"] if "equal_transformers" in row else []
    words += [f"{row['padded_transformers']} after padding on the left"] if "padded_transformers" in row else []
    return ", ".join(words)


def make_decoder(folder: Path, family: str) -> Path:
    """A tiny random model whose logits are not flat, with a tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    sizes = {key: value for key, value in _SIZES.items() if family != "gpt2" or key.endswith("token_id")}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**sizes, **FAMILIES[family]}), dtype=torch.float32)
    return save(sharpened(model), folder)


def sharpened(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0 if "gemma" not in model.config.model_type or "embed" not in name else 1.0)
    return model


def save(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    if vocab := getattr(model.config, "vocab_size", None):
        write_tokenizer(folder, vocab)
    return folder


def decoder_rows(model: Path, name: str, programs: dict[str, str], js: Path | None, beside: Path | None = None) -> Iterator[dict[str, Any]]:
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocab, PROMPT).tolist()
    folders: dict[str, Path] = {}
    for variant, options in VARIANTS.items():
        folder = (beside or model.parent) / f"{name}-{variant.replace(' ', '-')}"
        try:
            api.export(model=model, output=folder, device="cpu", **options)
            folders[variant] = folder
        except QltError as error:
            yield {"model": name, "scheme": variant, "program": "qlt export", "opened": False, "reason": public(str(error))}
    if not folders:
        return
    wanted = transformers_tokens(model, ids)
    ours = {variant: our_tokens(folder, ids) for variant, folder in folders.items()}
    listed, rest = json.dumps([str(folder) for folder in folders.values()]), [json.dumps(ids), NEW]
    answers = {
        "onnxruntime-genai": run([programs["genai"], "-c", GENAI, listed, *rest], len(folders)),
        "ORTModelForCausalLM": run([programs["optimum"], "-c", OPTIMUM, listed, *rest], len(folders)),
        "transformers.js": run_js(js, list(folders.values()), rest),
    }
    for program, answered in answers.items():
        for variant, answer in zip(folders, answered, strict=True):
            row = {"model": name, "scheme": variant, "program": program, **compared(answer, ours[variant])}
            if "tokens" in answer and variant.startswith("fp32"):
                row["equal_transformers"] = prefix(answer["tokens"], wanted[0])
                row |= {"padded_transformers": prefix(answer["padded"], wanted[1])} if "padded" in answer else {}
            yield row
    for folder in folders.values():
        shutil.rmtree(folder)


def our_tokens(folder: Path, ids: list[int]) -> list[int]:
    session = open_ours(folder, 1)
    try:
        found = [int(session.prefill(np.asarray([ids])).argmax())]
        while len(found) < NEW:
            found.append(int(session.decode(np.asarray(found[-1:])).argmax()))
        return found
    finally:
        session.close()


@torch.inference_mode()
def transformers_tokens(model: Path, ids: list[int]) -> list[list[int]]:
    """Of the prompt, and of its end padded on the left."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    given = torch.tensor([ids, [0] * 6 + ids[6:]])
    mask = torch.ones_like(given)
    mask[1, :6] = 0
    out = [loaded.generate(given[[row]], attention_mask=mask[[row]], max_new_tokens=NEW, do_sample=False, pad_token_id=0) for row in (0, 1)]
    return [found[0, len(ids) :].tolist() for found in out]


def compared(answer: dict[str, Any], ours: list[int]) -> dict[str, Any]:
    """How many tokens from the first on are the same; a program may stop at the end of text, where ours goes on."""
    if "error" in answer:
        return {"opened": False, "reason": answer["error"]}
    return {"opened": True, "tokens": len(answer["tokens"]), "equal": prefix(answer["tokens"], ours)}


def prefix(left: list[int], right: list[int]) -> int:
    return next((position for position, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def run(command: list[Any], count: int, cwd: Path | None = None) -> list[dict[str, Any]]:
    """The ``count`` answers of a program; what it did not get to answer is an error with the end of what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=cwd)
    found: list[dict[str, Any]] = [json.loads(line.removeprefix("ANSWER")) for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    for answer in found:
        if "error" in answer:
            answer["error"] = public(answer["error"])
    said = public(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    return found + [{"error": said}] * (count - len(found))


def public(text: str) -> str:
    """An error in one line, without paths of this machine."""
    return re.sub(r"(/[\w.+-]+)+/", "…/", " ".join(text.split()))[:300]


def run_js(js: Path | None, folders: list[Path], rest: list[Any]) -> list[dict[str, Any]]:
    if js is None or shutil.which("node") is None:
        return [{"error": "not tried: there is no node"}] * len(folders)
    script = js.resolve() / "qlt_open.mjs"
    script.write_text(JAVASCRIPT)
    try:
        return run(["node", script.name, f"{folders[0].parent}/", json.dumps([folder.name for folder in folders]), *rest], len(folders), cwd=js)
    finally:
        script.unlink()


def js_versions(js: Path | None) -> dict[str, str]:
    if js is None:
        return {}
    packages = ("@huggingface/transformers", "onnxruntime-node")
    return {name: json.loads((js / "node_modules" / name / "package.json").read_text())["version"] for name in packages}


def encoder_rows(folder: Path, name: str, programs: dict[str, str]) -> Iterator[dict[str, Any]]:
    model, class_name, output, shape = make_encoder(name)
    save(model, folder)
    wanted = encoder_output(type(model).from_pretrained(folder, dtype=torch.float32).eval(), output, shape)
    for scheme in ("fp32", "int8"):
        row = {"model": name, "scheme": scheme}
        out = folder.parent / f"{name}-{scheme}"
        try:
            api.export(model=folder, scheme=scheme, device="cpu", output=out)
        except QltError as error:
            yield {**row, "program": "qlt export", "opened": False, "reason": str(error)}
            continue
        (answer,) = run([programs["optimum"], "-c", OPTIMUM_ENCODER, out, class_name, output, json.dumps(shape)], 1)
        if "error" in answer:
            yield {**row, "program": class_name, "opened": False, "reason": answer["error"]}
        else:
            error = float(np.linalg.norm(np.asarray(answer["values"]) - wanted) / np.linalg.norm(wanted))
            yield {**row, "program": class_name, "opened": True, "error": error}
        shutil.rmtree(out)


def make_encoder(name: str) -> tuple[Any, str, str, list[int]]:
    """A tiny random encoder, the class that opens it, its output, the shape of its input."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "vit":
        return (
            ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)),
            "ORTModelForImageClassification",
            "logits",
            [1, 3, 32, 32],
        )
    config = BertConfig(**sizes, vocab_size=512, max_position_embeddings=64, num_labels=3)
    if name == "bert":
        return BertModel(config), "ORTModelForFeatureExtraction", "last_hidden_state", [2, 20]
    return BertForSequenceClassification(config), "ORTModelForSequenceClassification", "logits", [2, 20]


@torch.inference_mode()
def encoder_output(model: Any, output: str, shape: list[int]) -> np.ndarray:
    given = torch.arange(torch.Size(shape).numel()).reshape(shape)
    feeds = {"pixel_values": given / given.numel()} if len(shape) == 4 else {"input_ids": 3 + given % 400, "attention_mask": torch.ones_like(given)}
    return model(**feeds)[output].flatten().numpy()


if __name__ == "__main__":
    main()
