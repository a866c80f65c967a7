"""Settings of the teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..support.settings import Section


class TeacherConfig(Section):
    """The model that is converted, or the shapes of one that is trained from nothing."""

    path: str = Field(description="Local directory or hub id; in files and flags also the name of a preset.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the tokenizer.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type the weights are loaded in; precision fp32 makes them fp32; auto: fp32 on CPU, else bf16.",
    )
    config: dict[str, Any] | None = Field(
        None, description="The teacher's Hugging Face configuration, so that planning needs no network."
    )
    fresh: bool = Field(
        False,
        description="There is no teacher: weights are drawn from the seed, config has the shapes, path the tokenizer.",
    )


class TeacherModelConfig(Section):
    """The second model of a stage with `teacher: separate`."""

    path: str | None = Field(None, description="Local directory or hub id; null: the model that is converted.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(None, description="Quantize its linear layers.")
    shard: bool = Field(False, description="Shard its weights over the ranks (ZeRO-3 inference; needs a launcher).")
