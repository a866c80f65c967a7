"""What a plan says of exports, which is what the formats refuse."""

import pytest

from rwkvinside.cli.main import main as cli
from rwkvinside.config.load import load_config
from rwkvinside.export.limits import exports_line, reasons_against
from rwkvinside.export.registry import FORMATS
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.teacher.load import teacher_config


def permitted(teacher, **options):
    config = load_config(teacher=teacher, **options)
    reasons = reasons_against(teacher_config(config.teacher), config.student)
    assert reasons.keys() == FORMATS.keys()
    return [name for name, found in reasons.items() if not found]


@pytest.mark.parametrize("teacher", ["Qwen3-8B", "Qwen3-14B"])
def test_recipes_make_what_their_engines_compute(teacher):
    assert permitted(teacher) == ["hf", "mlx"]
    assert permitted(teacher, recipe="hxa079") == ["hf", "mlx", "rwkv-infer"]
    assert permitted(teacher, recipe="gguf") == ["hf", "mlx", "gguf"]


def test_line_of_the_plan(capsys):
    assert cli(["plan", "-v", "--teacher", "Qwen3-8B"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "exports   hf, mlx" and lines[1].startswith("          gguf not: mixers rotate (rope) (and ")
    assert lines[2] == "          rwkv-infer not: student.key_scale is decay; log works"


def test_layers_that_are_still_to_be_chosen_count_as_kept():
    config = teacher_config(load_config(teacher="Qwen3-8B").teacher)
    student = StudentConfig.model_validate(
        {"preset": "hxa079", "key_scale": None, "attention_layers": {"choose": "restore", "keep": 4}},
        context={"num_layers": 36},
    )
    line = exports_line(config, student)
    assert "gguf not: layer 0 keeps attention" in line
    assert "rwkv-infer not: student.attention_rope is true; false works" in line
