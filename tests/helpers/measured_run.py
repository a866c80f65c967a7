"""A run directory with all that a report shows, its numbers made up, and a reader of the pages that are made of it."""

import json
from html.parser import HTMLParser

import yaml

SAMPLE = {"prompt": "Once <b>upon</b>", "student": " a time & so on", "teacher": " a day"}


def scores(stage, step, tokens, kl, time, kind="eval"):
    numbers = {"kl": kl, "ce": 3 + kl, "ce_teacher": 3.0, "agreement": 1 - kl / 10}
    return {"kind": kind, "stage": stage, "step": step, "tokens": tokens, "time": time, **numbers}


def save_run(path, layers=3, steps=40, window=8):
    """A run directory with all that a page shows; the numbers are made up."""
    path.mkdir()
    rows = [scores("calibrate", 0, 0, 8, 0), scores("calibrate", 1, 100, 2, 1)]
    for stage, length in (("align", steps), ("distill", steps)):
        for step in range(1, length + 1):
            row = {"kind": "train", "stage": stage, "step": step, "tokens": 100 * step, "loss": 1 / step, "lr": 1e-3}
            row |= {"grad_norm": 1.0, "tokens_per_s": 50.0, "mfu": 0.25, "memory_mb": 100.0, "time": 2 * step}
            if stage == "align":
                row["layers"] = {str(i): (i + 1) / step for i in range(layers)}
            rows.append(row)
        rows.append(scores(stage, length, 100 * length, 0.5 if stage == "align" else 0.25, 3 * length))
    rows.append(scores("distill", steps, 100 * steps, 0.75, 3 * steps, kind="control"))
    sample = {"kind": "sample", "stage": "distill", "step": steps, "tokens": 100 * steps, "time": 200}
    rows.append(sample | {"samples": [SAMPLE]})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"teacher": {"path": "/models/Small"}, "data": {"val": ["val.jsonl"]}}
    config["student"] = {"window": window, "window_mix": "softmax"}
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"out": str(path)}))
    (path / "conversion.json").write_text(json.dumps({"run": "abc", "teacher": "/models/Small"}))
    mixer = {"kind": "rwkv", "window": window, "sinks": 2} if window else {"kind": "rwkv"}
    stages = [{"name": name, "peak": 2 * 10**8} for name in ("calibrate", "align", "distill")]
    forecast = {"layers": [{"kind": "attention"}, *[mixer] * (layers - 1)], "device": "cuda", "stages": stages}
    (path / "plan.json").write_text(json.dumps(forecast | {"warnings": ["no layer is spared"]}))
    buckets = [
        {"first": 2**k, "last": 2 ** (k + 1) - 1, "perplexity": 9, "perplexity_teacher": 8, "kl": 0.1} for k in range(5)
    ]
    (path / "eval.json").write_text(json.dumps({"kl": 0.1, "by_position": buckets}))
    return path


class Reader(HTMLParser):
    """Collects what a page refers to and checks that its elements are closed in order."""

    VOID = {"meta", "link", "br", "img", "hr"}

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.ids, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += "" if tag in ("span", "small") else " "

    def handle_data(self, data):
        self.text += data
