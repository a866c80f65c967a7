"""From recipe, files, flags and `key=value` to one checked configuration; every problem is reported, all at once.

Later beats earlier: defaults by the teacher's width < the teacher's recipe < its variants < -c files in order < flags <
key=value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import UserError
from ..stages.registry import OBJECTIVES, RUN, STAGES, stage_class
from ..stages.settings import StageConfig
from ..support.text import did_you_mean
from .schema import Config
from .show import inner_model
from .teacher_lookup import TeacherInfo, find_teacher, variants

DEFAULT_DATA = "hub:HuggingFaceFW/fineweb-edu:sample-10BT"  # for teachers from the hub when no data is named


REFERENCE = "all fields: rwkvinside config fields"


def load_config(
    files: Sequence[str | os.PathLike] = (),
    *,
    teacher: str | None = None,
    variant: Sequence[str] = (),
    data: Sequence[str] = (),
    val: Sequence[str] = (),
    out: str | None = None,
    deepspeed: str | None = None,
    stage: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Read, merge and check a configuration.

        config = rw.load_config(["mine.yaml"], teacher="Qwen3-14B", overrides=["stages.align.tokens=600k"])
        print(config.stages["align"].tokens)

    Args:
        files: YAML files, later ones beat earlier ones.
        teacher: name of a recipe, local directory or hub id.
        variant: names of shipped variants (one-card, quantized, ...), later ones beat earlier ones.
        data, val, out: the fields data.train, data.val and out.
        deepspeed: JSON file with a configuration of DeepSpeed's own, the field deepspeed.config.
        stage: one that is to run whether `run` names it or not; the teacher need not fit stages that do not run.
        overrides: `path.of.field=value`, values in YAML syntax.

    Raises:
        UserError: with all problems found.
    """
    flags: list[dict] = []
    flags += [{"teacher": {"path": teacher}}] if teacher else []
    flags += [{"data": {name: list(paths)}} for name, paths in (("train", data), ("val", val)) if paths]
    flags += [{"variant": list(variant)}] if variant else []
    flags += [{"out": out}] if out else []
    flags += [{"deepspeed": {"config": _read_json(deepspeed)}}] if deepspeed else []
    given = _merge([*map(_read_yaml, files), *flags, *map(_override, overrides)])
    found = _find(given)
    if isinstance(given.get("variant"), str):
        given["variant"] = [given["variant"]]
    own = given.pop("variants", found.recipe.get("variants"))
    merged = _merge([found.recipe, *_variants(given.get("variant"), own), given])
    merged.pop("variants", None)
    merged["teacher"]["path"] = found.path
    if not found.local:
        merged = _merge([{"data": {"train": [DEFAULT_DATA]}}, merged])
    merged.setdefault("out", f"runs/{found.name}")
    if "run" not in merged:
        published = _mapping(merged.get("student")).get("init") == "published"
        merged["run"] = [name for name in RUN if not (published and name == "calibrate")]
    merged["stages"], refused = _with_stage_defaults(merged.get("stages"), found)
    return _complete(_validate(merged, found, refused, stage), found)


def _find(given: dict) -> TeacherInfo:
    teacher = _mapping(given.get("teacher"))
    path, fields = teacher.get("path"), teacher.get("config")
    if not isinstance(path, str):
        raise UserError(
            f"teacher.path is {path!r}" if path is not None else "no teacher is given",
            "use --teacher with a preset such as Qwen3-14B, a local directory or a hub id",
        )
    return find_teacher(path, revision=teacher.get("revision"), fields=fields if isinstance(fields, dict) else None)


def _variants(names: object, own: object) -> list[dict]:
    """Settings of the named variants, each followed by what the recipe says of it for its own model.

    Args:
        names: list of names; anything else is left to the validation.
        own: the recipe's key `variants`, {name: settings}.

    Raises:
        UserError: a variant of no known name.
    """
    shipped, layers = variants(), []
    for name in names if isinstance(names, list) else []:
        if name not in shipped:
            cause = f"variant {_show(name)} is not known{did_you_mean(str(name), shipped)}"
            raise UserError(cause, f"variants: {', '.join(shipped)}")
        layers += [shipped[name], _mapping(_mapping(own).get(name))]
    return layers


def _with_stage_defaults(given: object, found: TeacherInfo) -> tuple[dict, dict[tuple[str, ...], str]]:
    """Settings of all known and given stages over their defaults; {location: problem} of those that get no defaults."""
    problems: dict[tuple[str, ...], str] = {}
    if given is not None and not isinstance(given, dict):
        problems["stages",] = f"stages = {_show(given)}: must be a mapping from stage names to settings"
        given = None
    stages = {}
    for name in [*STAGES, *(n for n in given or {} if n not in STAGES)]:
        own = (given or {}).get(name) or {}
        objective = own.get("objective") if isinstance(own, dict) else None
        stage = stage_class(name, objective) if isinstance(objective, str | None) else None
        path = ("stages", name)
        if not isinstance(own, dict):
            problems[path] = f"stages.{name} = {_show(own)}: must be a mapping of settings"
        elif stage is not None:
            own = _merge([stage.defaults(found.hidden_size, found.max_positions), own])
        elif objective is None:
            problems[path] = f"stages.{name}: a stage of your own needs an objective{did_you_mean(name, STAGES)}"
        else:
            near = did_you_mean(str(objective), OBJECTIVES)
            problems[path] = f"stages.{name}.objective = {_show(objective)}: allowed: {', '.join(OBJECTIVES)}{near}"
        stages[name] = own
    return stages, problems


def _validate(merged: dict, found: TeacherInfo, refused: dict[tuple[str, ...], str], stage: str | None) -> Config:
    problems = list(refused.values())

    def read(model: type[BaseModel], values: object, *at: str, **context: int | None) -> BaseModel | None:
        """The model of these values; None where it refuses them, and `problems` says why."""
        try:
            return model.model_validate(values, context=context)
        except ValidationError as error:
            problems.extend(_problem(e, at) for e in error.errors(include_url=False))
            return None

    run = merged["run"] if isinstance(merged["run"], list) else []
    stages = {}
    for name, own in merged["stages"].items():
        if ("stages", name) not in refused:  # what else is missing there, where no defaults are, says nothing
            longest = found.max_positions if name in (*run, stage) else None
            stages[name] = read(StageConfig, own, "stages", name, max_positions=longest)
    fit = {name: own for name, own in stages.items() if own is not None}
    config = read(Config, merged | {"stages": fit}, num_layers=found.num_layers)
    problems.extend(
        f"run names stage {name!r}, which is not in stages{did_you_mean(name, merged['stages'])}"
        for name in run
        if isinstance(name, str) and name not in merged["stages"]
    )
    if len(problems) == 1:
        raise UserError(problems[0], REFERENCE)
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problems in the configuration:", *problems]), REFERENCE)
    return config


def _complete(config: Config, found: TeacherInfo) -> Config:
    """Fill in what follows from other fields: learning rates and warm-up."""
    stages = {name: _complete_stage(name, stage, found.hidden_size) for name, stage in config.stages.items()}
    return config.model_copy(update={"stages": stages})


def _complete_stage(name: str, stage: StageConfig, width: int) -> StageConfig:
    if stage.optim is None:
        return stage
    kind = stage_class(name, stage.objective)
    rates = kind.learning_rates(width)
    own = {key: getattr(stage.optim, key) for key in rates}
    if own["lr"] is not None:  # the other two keep their proportion to it
        rates = {key: rate * own["lr"] / rates["lr"] for key, rate in rates.items()}
    values = {key: float(f"{rate:.4g}") if own[key] is None else own[key] for key, rate in rates.items()}
    if stage.optim.warmup_steps is None:
        values["warmup_steps"] = kind.warmup_steps(stage.length.steps)
    return stage.model_copy(update={"optim": stage.optim.model_copy(update=values)})


def _read_yaml(file: str | os.PathLike) -> dict:
    try:
        with open(file, encoding="utf-8") as stream:
            values = OmegaConf.load(stream)
        if not isinstance(values, DictConfig):
            raise UserError(f"{file} holds no mapping of settings", REFERENCE)
        return OmegaConf.to_container(values, resolve=True)
    except OSError as error:
        raise UserError(f"configuration {file} cannot be read: {error.strerror}", "check the path") from error
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration {file} is not valid YAML: {reason}", "correct the file") from error


def _read_json(file: str | os.PathLike) -> dict:
    try:
        with open(file, encoding="utf-8") as stream:
            values = json.load(stream)
    except OSError as error:
        raise UserError(f"configuration {file} cannot be read: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise UserError(f"configuration {file} is not valid JSON: {error}", "correct the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no mapping of settings", "see DeepSpeed's documentation of its configuration")
    return values


def _override(text: str) -> dict:
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"{text!r} is not of the form key=value", "for instance stages.align.tokens=600k")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{text!r}: the value is not valid YAML: {reason}", "quote it") from error
    return values


def _merge(layers: Iterable[dict]) -> dict:
    """Mappings are merged, everything else (lists too) is replaced by the later layer."""
    return OmegaConf.to_container(OmegaConf.merge({}, *map(OmegaConf.create, layers)))


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _problem(error: ErrorDetails, at: Sequence[str]) -> str:
    """One line: path (below `at`), the value that was given, what is allowed, the nearest known key."""
    location = [str(part) for part in (*at, *error["loc"])]
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        inside = "".join(f"{part}." for part in location[:-1])
        return f"{path}: unknown key{did_you_mean(location[-1], _keys(location[:-1]), inside)}"
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        near = did_you_mean(str(error["input"]), allowed.split(", "))
        return f"{path} = {_show(error['input'])}: allowed: {allowed}{near}"
    if error["type"] == "model_type":
        return f"{path} = {_show(error['input'])}: must be a mapping of settings"
    message = error["msg"].removeprefix("Input ").replace("should", "must")
    shown = "" if isinstance(error["input"], dict) else f" = {_show(error['input'])}"
    return f"{path}{shown}: {message[:1].lower()}{message[1:]}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keys(location: list[str]) -> list[str]:
    """Known keys of the mapping at a path of the configuration."""
    model: type[BaseModel] = Config
    parts = iter(location)
    for part in parts:
        inner = inner_model(model.model_fields[part].annotation)
        if part == "stages":
            next(parts)
        model = inner
    return list(model.model_fields)
