"""The model card of an export, from its conversion.json and the base model's card. Writes no files."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..hybrid.settings import AdapterConfig
from ..runs.metrics_file import of_kind, read_metrics
from ..support.text import rounded_bytes

COLUMNS = {
    "tokens": "tokens",
    "kl": "KL to teacher",
    "ce": "CE",
    "ce_teacher": "CE of teacher",
    "agreement": "top-1 agreement",
}

CONTROL = """The control is the base model, untrained, with the attention of the converted layers merely cut to the
windows that the recurrent layers have here: what the student has to beat."""

CONVERTED = """{count} of the {layers} attention layers of {base_link} are replaced by RWKV-7 time
mixers (`{preset}`); {others}. The recurrent layers need the same memory and time per token at any context length."""

FROM_NOTHING = """A language model that was trained from nothing: {count} of its {layers} layers are RWKV-7 time mixers
(`{preset}`); {others}. The recurrent layers need the same memory and time per token at any context length."""

TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "<this repository or directory>"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

Torch and transformers are all it needs; on a GPU with triton, which comes with PyTorch for CUDA, it runs a kernel that
is part of the code here. Greedy decoding, sampling, beams, left-padded batches, chunked prefill and streaming work with
the default cache; static caches and assisted generation do not."""

BODY = """# {title}

{intro}

| | |
|---|---|
| layers | `{layout}` (`R` RWKV-7, `A` attention) |
| parameters | {parameters:,} |
| weights | {dtype}, {embeddings} embeddings |
| last training stage | `{stage}`, `{checkpoint}` |

## Use

{usage}

## Measured on held-out data

{table}

{reloaded}, its fp32 logits differ from the trained model's by at most
{difference:.2g}. `conversion.json` holds the configuration, the SHA-256 of every file, and this verification.
"""


def measurements(metrics: Path, stage: str | None = None, step: int | None = None) -> dict[str, dict]:
    """Return the last evaluation of each stage in a metrics.jsonl; {} without a file.

    Args:
        metrics: the file.
        stage, step: the exported checkpoint, where there is one: of this stage only the evaluation of this step counts.
    """
    rows = of_kind(read_metrics(metrics), "eval") if metrics.exists() else []
    rows = [row for row in rows if row["stage"] != stage or row["step"] == step]
    return {row["stage"]: {name: row[name] for name in ("step", *COLUMNS, "teacher") if name in row} for row in rows}


def control(metrics: Path) -> dict | None:
    """Return the scores of a windowed student's control in a metrics.jsonl; None where there are none."""
    rows = of_kind(read_metrics(metrics), "control") if metrics.exists() else []
    return {name: rows[-1][name] for name in COLUMNS if name != "tokens" and name in rows[-1]} if rows else None


def model_card(
    conversion: dict,
    base_card: Path,
    usage: str = TRANSFORMERS,
    library: str | None = "transformers",
    reloaded: str = "Reloaded in a process without the training code",
) -> ModelCard:
    """Return the card of an export.

    Args:
        conversion: conversion.json of the export, verified.
        base_card: README.md of the base model, whose license is adopted; it need not exist.
        usage: how it is used, as Markdown.
        library: that the hub loads it with; None: it knows none.
        reloaded: how it was verified.
    """
    base = ModelCard.load(base_card).data.to_dict() if base_card.exists() else {}
    name = conversion["base_model"]
    data = ModelCardData(
        **({} if name is None else {"base_model": name, "base_model_relation": "finetune"}),
        library_name=library,
        pipeline_tag="text-generation",
        tags=["rwkv", "rwkv7", "hybrid", *(["custom_code"] if library else [])],
        **{name: base[name] for name in ("license", "license_name", "license_link", "language") if name in base},
    )
    recurrent, attention = conversion["rwkv_layers"], conversion["attention_layers"]
    layers = len(recurrent) + len(attention)
    student = conversion["student"]
    kept = f"softmax attention, {'with' if student['attention_rope'] else 'without'} rotary positions"
    if base := student.get("attention_log_base"):
        kept += f", scores times the logarithm (base {base:g}) of the position plus {base:g}"
    if window := student.get("attention_window"):
        kept += f", to the last {window} tokens and the first {student['attention_sinks']}"
    verb = "keep" if name else "are"
    intro = (CONVERTED if name else FROM_NOTHING).format(
        base_link=f"[{name}](https://huggingface.co/{name})" if "/" in (name or "") else name,
        count=len(recurrent),
        layers=layers,
        preset=student["preset"],
        others=f"{len(attention)} {verb} {kept}"
        if attention
        else f"none {'keeps' if name else 'is'} softmax attention",
    )
    body = BODY.format(
        title=f"{name.rsplit('/', 1)[-1]} with RWKV-7" if name else "RWKV-7 language model",
        intro=intro,
        layout="".join("R" if i in recurrent else "A" for i in range(layers)),
        embeddings="tied" if conversion["tie_word_embeddings"] else "untied",
        table=table(conversion["measurements"], conversion.get("control")),
        difference=conversion["verification"]["max_difference"],
        usage=usage,
        reloaded=reloaded,
        **{field: conversion[field] for field in ("parameters", "dtype", "stage", "checkpoint")},
    )
    body += "".join(f"\n{line}.\n" for line in changes(conversion))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def changes(conversion: dict) -> list[str]:
    """Return sentences on the cost of quantization and on where the adapters are.

    Args:
        conversion: conversion.json of the export.
    """
    lines = []
    if quantized := conversion.get("quantized"):
        lines.append(
            f"{len(quantized['layers'])} linear layers ({quantized['weights']:,} weights) were frozen in "
            f"{quantized['format']} during training ({rounded_bytes(quantized['bytes_in_training'])}) and are stored "
            f"unpacked, as they were trained with: they differ from the base model's by "
            f"{100 * quantized['relative_error']:.2g} %, and the rest has adapted to that"
        )
    if adapters := conversion.get("adapters"):
        kinds = ", ".join(AdapterConfig.model_validate(spec).title for spec in adapters["trained"])
        directories = adapters["directories"]
        where = "merged into the weights" if adapters["merged"] else f"PEFT adapters in {', '.join(directories)}"
        order = ", each to be merged (`merge_and_unload`) before the next is loaded" if len(directories) > 1 else ""
        lines.append(f"Adapters ({kinds}) are {where}{order}")
    return lines


def table(rows: dict[str, dict], control: dict | None = None) -> str:
    """Return measurements as Markdown, with those of a windowed student's control; which teacher is not the original.

    Args:
        rows: by stage, see `measurements`.
        control: see the function of this name.
    """
    if not rows:
        return "The run was not evaluated."
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    lines = [["after stage", *(COLUMNS[name] for name in names)], ["---"] * (len(names) + 1)]
    lines += [[stage, *(_number(row.get(name)) for name in names)] for stage, row in rows.items()]
    if control is not None:
        lines += [["(control)", *(_number(control.get(name)) for name in names)]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    others = [
        f"After stage {stage} the teacher is not the original: {row['teacher']}."
        for stage, row in rows.items()
        if row.get("teacher")
    ]
    return "\n\n".join([table, *([] if control is None else [CONTROL]), *others])


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
