"""From presets, files, flags and `key=value` to one checked configuration.

Later beats earlier: defaults by the teacher's width < the teacher's preset < the recipe < variants < -c files in order
< flags < key=value. All problems are reported at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import TypeVar, cast, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from ..errors import UserError
from ..hybrid.layouts import MEASURED, LayerChoice
from ..stages.base import STEPS_RATE, Stage
from ..stages.registry import OBJECTIVES, RUN, STAGES, find_stage_class, stage_class
from ..stages.settings import StageConfig
from ..support.files import read_text
from ..support.settings import Section, parse_count
from ..support.text import did_you_mean, listed
from .recipes import recipe_layers
from .schema import Config
from .show import inner_model
from .teacher_lookup import TeacherInfo, find_teacher, variants

DEFAULT_DATA = "hub:HuggingFaceFW/fineweb-edu:sample-10BT"  # for teachers from the hub when no data is named
REFERENCE = "all fields: rwkvinside config fields"

LAYOUT = "attention_layers"  # of a student
UNREADABLE = (ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException)

Model = TypeVar("Model", bound=BaseModel)


def load_config(
    files: Sequence[str | os.PathLike | Mapping] = (),
    *,
    teacher: str | None = None,
    recipe: str | None = None,
    variant: Sequence[str] = (),
    data: Sequence[str] = (),
    val: Sequence[str] = (),
    out: str | None = None,
    deepspeed: str | None = None,
    stage: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the configuration that files, flags and overrides make together.

        config = rw.load_config(["mine.yaml"], teacher="Qwen3-14B", overrides=["stages.align.tokens=600k"])
        print(config.stages["align"].tokens)

    Args:
        files: YAML files, or settings as plain values; later ones beat earlier ones. One needs no list, here and below.
        teacher: name of a preset, local directory or hub id.
        recipe: name of a shipped recipe (radlads, hxa079, halo, simultaneous, windowed): student, stages, rates.
        variant: names of shipped variants (one-card, quantized, ...), later ones beat earlier ones.
        data, val, out: the fields data.train, data.val and out.
        deepspeed: JSON file with DeepSpeed's own configuration, the field deepspeed.config.
        stage: one that is to run whether `run` names it or not; the teacher need not fit stages that do not run.
        overrides: `path.of.field=value`, values in YAML syntax.

    Raises:
        UserError: lists all problems.
    """
    flags: list[dict] = []
    flags += [{"teacher": {"path": teacher}}] if teacher is not None else []
    flags += [{"data": {name: listed(paths)}} for name, paths in (("train", data), ("val", val)) if paths]
    flags += [{"recipe": recipe}] if recipe is not None else []
    flags += [{"variant": listed(variant)}] if variant else []
    flags += [{"out": out}] if out is not None else []
    flags += [{"deepspeed": {"config": _read_json(deepspeed)}}] if deepspeed is not None else []
    layers = [*read_settings(files), *flags, *read_settings((), overrides)]
    _check_sections(layers)
    user = merge_settings(layers)
    info = _find_teacher(user)
    if isinstance(user.get("variant"), str):
        user["variant"] = [user["variant"]]
    of_teacher = {key: user.pop(key, info.preset.get(key)) for key in ("recipes", "variants")}
    preset = {key: value for key, value in info.preset.items() if key not in of_teacher}
    recipe_settings = recipe_layers(user.get("recipe"), of_teacher["recipes"], info)
    merged = merge_settings([preset, *recipe_settings, *_variants(user.get("variant"), of_teacher["variants"]), user])
    merged["teacher"]["path"] = info.path
    if not info.local:
        merged = merge_settings([{"data": {"train": [DEFAULT_DATA]}}, merged])
    merged.setdefault("out", f"runs/{info.name}")
    if "run" not in merged:
        published = _mapping(merged.get("student")).get("init") == "published"
        merged["run"] = [name for name in RUN if not (published and name == "calibrate")]
    if _chooses(_mapping(merged.get("student")).get(LAYOUT)):
        merged = _with_choosing_stage(merged)
    sections = merged.get("stages")
    merged["stages"], refused = _with_stage_defaults(sections, info)
    return _complete(_validate(merged, info, refused, stage), info, _mapping(sections))


def read_settings(files: Sequence[str | os.PathLike | Mapping], overrides: Sequence[str] = ()) -> list[dict]:
    """Return the settings of files, then of overrides; arguments and errors as of `load_config`."""
    given = [dict(file) if isinstance(file, Mapping) else _read_yaml(file) for file in listed(files)]
    return [*given, *map(_override, listed(overrides))]


def check_section(model: type[Model], values: dict, *, source: str = "", hint: str = "") -> Model:
    """Return a section of settings from plain values.

    Args:
        model: of the section.
        values: of its fields.
        source: file that the values are from, named before a problem.
        hint: what to do about a problem.

    Raises:
        UserError: lists all problems.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_problem(e, (), model) for e in error.errors(include_url=False)]
    before = f"{source}: " if source else ""
    if len(problems) == 1:
        raise UserError(before + problems[0], hint)
    raise UserError(f"{before}{len(problems)} problems in the configuration:", hint, problems)


def _chooses(layout: object) -> bool:
    return isinstance(layout, dict) and layout.get("choose") in MEASURED


def _with_choosing_stage(settings: dict) -> dict:
    """Return settings whose run has a stage that chooses layers.

    Where it names none, that is `choose`, after the last stage that needs the attention of all layers.
    """
    run, sections = settings["run"], _mapping(settings.get("stages"))
    if not isinstance(run, list) or not all(isinstance(name, str) for name in run):
        return settings

    def kind(name: str) -> type[Stage] | None:
        objective = _mapping(sections.get(name)).get("objective")
        return find_stage_class(name, objective) if isinstance(objective, str | None) else None

    kinds = [kind(name) for name in run]
    if "choose" not in run and not any(kind is not None and kind.chooses_layers for kind in kinds):
        at = 1 + max((i for i, kind in enumerate(kinds) if kind is not None and kind.needs_attention), default=-1)
        run = [*run[:at], "choose", *run[at:]]
    if "choose" in run and isinstance(sections.get("choose", {}), dict | None):
        sections = sections | {"choose": {"objective": "choose"} | (sections.get("choose") or {})}
    return settings | {"run": run, "stages": sections}


def _wrong_choices(config: Config) -> list[str]:
    """Return the problems of stages that choose layers."""
    choosing = [name for name in config.run if name in config.stages and config.stages[name].objective == "choose"]
    layers = config.student.attention_layers
    if choosing and not isinstance(layers, LayerChoice):
        return [f"stages.{choosing[0]} chooses layers, but student.attention_layers names {list(layers)}"]
    return [f"run chooses layers twice: {', '.join(choosing)}"] if len(choosing) > 1 else []


def _find_teacher(user: dict) -> TeacherInfo:
    teacher = _mapping(user.get("teacher"))
    path, fields = teacher.get("path"), teacher.get("config")
    if not isinstance(path, str):
        raise UserError(
            f"teacher.path is {path!r}" if path is not None else "no teacher is given",
            "use --teacher with a preset such as Qwen3-14B, a local directory or a hub id",
        )
    return find_teacher(
        path,
        revision=teacher.get("revision"),
        fields=fields if isinstance(fields, dict) else None,
        fresh=teacher.get("fresh") is True,
    )


def _variants(names: object, of_teacher: object) -> list[dict]:
    """Return the settings of the named variants, in order.

    Each is followed by what the teacher's preset says about it for its own model.

    Args:
        names: list of names; anything else is left to the validation.
        of_teacher: the preset's key `variants`, {name: settings}.

    Raises:
        UserError: a variant is not known.
    """
    shipped, layers = variants(), []
    for name in names if isinstance(names, list) else []:
        if name not in shipped:
            cause = f"variant {_show(name)} is not known{did_you_mean(str(name), shipped)}"
            raise UserError(cause, f"variants: {', '.join(shipped)}")
        layers += [shipped[name], _mapping(_mapping(of_teacher).get(name))]
    return layers


def _with_stage_defaults(configured: object, teacher: TeacherInfo) -> tuple[dict, dict[tuple[str, ...], str]]:
    """Return the settings of all stages over their defaults.

    Args:
        configured: settings by stage name, as configured.
        teacher: decides the defaults.

    Returns:
        Settings of all known and configured stages, and {location: problem} of those that get no defaults.
    """
    problems: dict[tuple[str, ...], str] = {}
    if configured is not None and not isinstance(configured, dict):
        problems["stages",] = f"stages = {_show(configured)}: must be a mapping from stage names to settings"
    sections = _mapping(configured)
    stages = {}
    for name in [*STAGES, *(n for n in sections if n not in STAGES)]:
        section = sections.get(name) or {}
        objective = section.get("objective") if isinstance(section, dict) else None
        stage = find_stage_class(name, objective) if isinstance(objective, str | None) else None
        path = ("stages", name)
        if not isinstance(section, dict):
            problems[path] = f"stages.{name} = {_show(section)}: must be a mapping of settings"
        elif stage is not None:
            section = merge_settings([stage.defaults(teacher.hidden_size, teacher.max_positions), section])
            section = merge_settings([{"batch": {"tokens": _step_tokens(stage, section, teacher)}}, section])
        elif objective is None:
            problems[path] = f"stages.{name}: a stage of your own needs an objective{did_you_mean(name, STAGES)}"
        else:
            near = did_you_mean(str(objective), OBJECTIVES)
            problems[path] = f"stages.{name}.objective = {_show(objective)}: allowed: {', '.join(OBJECTIVES)}{near}"
        stages[name] = section
    return stages, problems


def _step_tokens(stage: type[Stage], section: dict, teacher: TeacherInfo) -> int:
    """Return the default tokens of a stage's step; counts that validation will refuse do not count."""

    def count(value: object, otherwise: int) -> int:
        try:
            return parse_count(value)
        except PydanticCustomError:
            return otherwise

    tokens, seq_len = section.get("tokens"), _mapping(section.get("data")).get("seq_len")
    return stage.step_tokens(teacher.hidden_size, count(tokens, sys.maxsize), count(seq_len, 1))


def _validate(merged: dict, teacher: TeacherInfo, refused: dict[tuple[str, ...], str], stage: str | None) -> Config:
    problems = list(refused.values())

    def read(model: type[Model], values: object, *at: str, **context: int | None) -> Model | None:
        # None where the model refuses the values; `problems` then says why
        try:
            return model.model_validate(values, context=context)
        except ValidationError as error:
            problems.extend(_problem(e, at) for e in error.errors(include_url=False))
            return None

    run = merged["run"] if isinstance(merged["run"], list) else []
    stages = {}
    for name, section in merged["stages"].items():
        if ("stages", name) not in refused:  # without its defaults a stage lacks fields that nobody left out
            longest = teacher.max_positions if name in (*run, stage) else None
            stages[name] = read(StageConfig, section, "stages", name, max_positions=longest)
    valid = {name: section for name, section in stages.items() if section is not None}
    config = read(Config, merged | {"stages": valid}, num_layers=teacher.num_layers)
    problems.extend(
        f"run names stage {name!r}, which is not in stages{did_you_mean(name, merged['stages'])}"
        for name in run
        if isinstance(name, str) and name not in merged["stages"]
    )
    problems.extend(_wrong_choices(config) if config is not None else [])
    if len(problems) == 1:
        raise UserError(problems[0], REFERENCE)
    if problems or config is None:
        raise UserError(f"{len(problems)} problems in the configuration:", REFERENCE, problems)
    return config


def _complete(config: Config, teacher: TeacherInfo, configured: Mapping) -> Config:
    """Return the configuration with what follows from other fields, `filled` in.

    These are learning rates and warm-up, and the tokens of steps, which `resolve` fits to the ranks.

    Args:
        config: validated.
        teacher: decides learning rates.
        configured: settings by stage name, without defaults.
    """
    stages = {}
    for name, stage in config.stages.items():
        share = 1.0
        if "tokens" not in _mapping(_mapping(configured.get(name)).get("batch")):
            stage = stage.model_copy(update={"batch": stage.batch.filled(tokens=stage.batch.tokens)})
            full = stage_class(name, stage.objective).full_step_tokens(teacher.hidden_size, stage.data.seq_len)
            share = stage.batch.tokens / full
        stages[name] = _complete_optimizer(name, stage, teacher.hidden_size, share)
    return config.model_copy(update={"stages": stages})


def _complete_optimizer(name: str, stage: StageConfig, width: int, share: float) -> StageConfig:
    """Return a stage with rates and warm-up filled in, whose default step is this share of a long stage's."""
    if stage.optim is None:
        return stage
    kind = stage_class(name, stage.objective)
    rates = kind.learning_rates(width)
    configured = {key: getattr(stage.optim, key) for key in rates}
    if configured["lr"] is not None:  # the other two keep their proportion to it
        rates = {key: rate * configured["lr"] / rates["lr"] for key, rate in rates.items()}
    elif kind.shrinks_steps:
        rates |= {key: rates[key] * share**STEPS_RATE for key in ("lr", "lr_final")}
        rates["lr_rest"] = min(rates["lr_rest"], rates["lr"])
    values = {key: float(f"{rate:.4g}") for key, rate in rates.items() if configured[key] is None}
    if stage.optim.warmup_steps is None:
        values["warmup_steps"] = kind.warmup_steps(stage.length.steps)
    return stage.model_copy(update={"optim": stage.optim.filled(**values)})


def _read_yaml(file: str | os.PathLike) -> dict:
    """Return the settings of a YAML file (`UserError`: it cannot be read, or is something else)."""
    try:
        values = OmegaConf.load(StringIO(read_text(file)))
        if not isinstance(values, DictConfig):
            raise UserError(f"{file} is not a mapping of settings", REFERENCE)
        return _plain(values)
    except OSError as error:
        raise UserError(f"configuration {file} cannot be read: {error.strerror}", "check the path") from error
    except UNREADABLE as error:
        raise UserError(f"configuration {file} is not valid YAML: {_reason(error)}", "correct the file") from error


def _read_json(file: str | os.PathLike) -> dict:
    try:
        values = json.loads(read_text(file))
    except OSError as error:
        raise UserError(f"configuration {file} cannot be read: {error.strerror}", "check the path") from error
    except UNREADABLE as error:
        raise UserError(f"configuration {file} is not valid JSON: {_reason(error)}", "correct the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a mapping of settings", "see DeepSpeed's documentation of its configuration")
    return values


def _override(text: str) -> dict:
    """Return the settings that `key=value` makes (`UserError`: it has another form)."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"{text!r} is not of the form key=value", "for instance stages.align.tokens=600k")
    try:
        return _plain(OmegaConf.from_dotlist([text]))
    except UNREADABLE as error:
        raise UserError(f"{_show(text)}: the value is not valid YAML: {_reason(error)}", "quote it") from error


def _reason(error: Exception) -> str:
    """Return what is wrong with a text in YAML or JSON, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    reason = " ".join(str(error).split())
    return "a number of more than 4,300 digits" if "integer string conversion" in reason else reason


def _check_sections(layers: Sequence[dict]) -> None:
    """Refuse another value in place of a section of which several layers say something: one would hide the other.

    Raises:
        UserError: names the section and the value.
    """
    for name in sorted(set().union(*layers) & {"stages", *Config.model_fields}):
        annotation = Config.model_fields[name].annotation
        values = [layer[name] for layer in layers if layer.get(name) is not None]
        section = name == "stages" or isinstance(annotation, type) and issubclass(annotation, BaseModel)
        wrong = [value for value in values if not isinstance(value, dict)]
        if section and wrong and len(values) > 1:
            raise UserError(f"{name} = {_show(wrong[0])}: must be a mapping of settings", _section_hint(name))


def _section_hint(name: str) -> str:
    examples = {"data": "as in data: {train: [a.jsonl]}", "teacher": "as in teacher: {path: Qwen/Qwen3-0.6B}"}
    return f"{examples[name]}; {REFERENCE}" if name in examples else REFERENCE


def merge_settings(layers: Iterable[dict]) -> dict:
    """Return the layers merged.

    Mappings are merged, everything else (lists too) is replaced by the later layer, and so is which layers keep
    attention: `{every: 4}` and `{last: 2}` of two files would be a third layout that nobody wrote.
    """
    layers = list(layers)
    layouts = [student[LAYOUT] for layer in layers if LAYOUT in (student := _mapping(layer.get("student")))]
    layers = [_without_layout(layer) for layer in layers]
    try:
        merged = _plain(cast(DictConfig, OmegaConf.merge({}, *map(OmegaConf.create, layers))), resolve=False)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"the settings do not fit together: {_reason(error)}", REFERENCE) from error
    if layouts:
        merged["student"][LAYOUT] = layouts[-1]
    return merged


def _without_layout(settings: dict) -> dict:
    if not isinstance(student := settings.get("student"), dict):
        return settings
    return settings | {"student": {name: value for name, value in student.items() if name != LAYOUT}}


def _plain(values: DictConfig, resolve: bool = True) -> dict:
    return cast(dict, OmegaConf.to_container(values, resolve=resolve))  # of a mapping


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _problem(error: ErrorDetails, at: Sequence[str], root: type[BaseModel] = Config) -> str:
    """Return a problem as one line.

    It has the path (below `at`), the value, what is allowed, and the nearest known key of `root`.
    """
    location = [str(key) for key in (*at, *error["loc"])]
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        inside = "".join(f"{key}." for key in location[:-1])
        if root is Config and path in STAGES:  # the key of a whole section, whatever of it was set
            inner = error["input"]
            keys = [f".{key}" for key in inner] if isinstance(inner, dict) and len(inner) == 1 else [""]
            return f"{path}{keys[0]}: unknown key; did you mean stages.{path}{keys[0]}?"
        model = _model_at(location[:-1], root)
        elsewhere = model.known_as.get(location[-1]) if issubclass(model, Section) else None
        meant = f"; here it is {elsewhere}" if elsewhere else did_you_mean(location[-1], model.model_fields, inside)
        return f"{path}: unknown key{meant}"
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        near = did_you_mean(str(error["input"]), allowed.split(", "))
        return f"{path} = {_show(error['input'])}: allowed: {allowed}{near}"
    if error["type"] == "model_type":
        return f"{path} = {_show(error['input'])}: must be a mapping of settings"
    message = error["msg"].removeprefix("Input ").replace("should", "must")
    mapping = isinstance(error["input"], dict)
    shown = "" if mapping and len(repr(error["input"])) > 60 else f" = {_show(error['input'])}"
    return f"{path}{shown}: {message[:1].lower()}{message[1:]}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _model_at(location: list[str], root: type[BaseModel]) -> type[BaseModel]:
    """Return the model of the mapping at a path below `root`."""
    model = root
    keys = iter(location)
    for key in keys:
        annotation = model.model_fields[key].annotation
        inner = inner_model(annotation)
        if inner is None:
            raise RuntimeError(f"{'.'.join(location)} is not a mapping of settings")
        if get_origin(annotation) in (dict, list, tuple):
            next(keys)  # a stage's name, or a place in the list
        model = inner
    return model
