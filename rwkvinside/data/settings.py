"""Settings of the data."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..support.settings import Count, Section, problem
from .catalog import resolve_names
from .defaults import DATE, MAX_LINE_BYTES

MixtureWeights = list[Annotated[float, Field(gt=0)]]


def _check_weights(train: list[str], weights: MixtureWeights | None) -> None:
    if weights is not None and len(weights) != len(train):
        raise problem("has {} weights for {} sources in train; give one for each", len(weights), len(train))


Sources = TypeVar("Sources", list[str], list[str] | None)


def _check_names(sources: Sources) -> Sources:
    if any(not source.strip() for source in sources or ()):
        raise problem("names a source by an empty text; give files, directories or hub:NAME")
    return sources if sources is None else resolve_names(sources)


class DataConfig(Section):
    """Settings of the data of a run."""

    train: list[str] = Field(
        [], description="Files, directories, packed or .idx data, hub:NAME[:config], or names of `data presets`."
    )
    weights: MixtureWeights | None = Field(
        None, description="Share of the tokens of each entry of train; null: every document once per epoch."
    )
    stream: bool = Field(False, description="Read and tokenize train while training runs, block by block.")
    block_tokens: Count = Field(
        4_000_000, description="Tokens of a streamed block, in which documents are shuffled; a chunk more at most."
    )
    val: list[str] = Field([], description="The same to validate on; empty: a part of the training documents.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="Part of the training documents, chosen by their hash, kept for validation when val is empty."
    )
    val_tokens: Count = Field(100_000, description="At most this many validation tokens are read.")
    cache_dir: str | None = Field(
        None, description="Where tokenized data is kept, and may be deleted; null: ~/.cache/rwkvinside/tokens."
    )
    text_column: str = Field("text", description="Field or column that holds a document's text.")
    max_line_bytes: Count = Field(
        MAX_LINE_BYTES, description="A longer line of a .jsonl or .txt file is refused: it is held as a whole."
    )
    rotate_options: bool = Field(
        True, description="Every multiple-choice question once with each rotation of its options; false: as given."
    )
    end_of_text: bool = Field(
        False, description="Put the tokenizer's end-of-text token after every text; true where train_rwkv.py trains."
    )
    today: str = Field(DATE, description="The day that chat templates with strftime_now see, YYYY-MM-DD.")
    check_ids: bool = Field(
        True, description="Refuse token ids in the data that the teacher's tokenizer would not give."
    )

    @field_validator("train", "val")
    @classmethod
    def _named(cls, sources: list[str]) -> list[str]:
        return _check_names(sources)

    @field_validator("today")
    @classmethod
    def _is_date(cls, today: str) -> str:
        try:
            return date.fromisoformat(today).isoformat()
        except ValueError as error:
            raise problem("must be a day such as {}", DATE) from error

    @model_validator(mode="after")
    def _mixture(self) -> DataConfig:
        _check_weights(self.train, self.weights)
        if self.stream and self.weights is None and len(self.train) > 1:
            raise problem("stream reads one source after the other; give weights to mix {}", len(self.train))
        return self


class StageData(Section):
    """Settings of the data of a stage."""

    seq_len: Annotated[int, Field(ge=2)] = Field(description="Tokens of a row.")
    train: list[str] | None = Field(None, description="Data of this stage alone; null: data.train.")
    weights: MixtureWeights | None = Field(None, description="As data.weights, for this stage's own train.")
    loss_on: Literal["completions", "all"] = Field(
        "completions", description="Of conversations and prompts with completions; all: every token is a target."
    )

    @field_validator("train")
    @classmethod
    def _named(cls, sources: list[str] | None) -> list[str] | None:
        return _check_names(sources)

    @model_validator(mode="after")
    def _mixture(self) -> StageData:
        _check_weights(self.train or [], self.weights)
        return self

    @field_validator("seq_len")
    @classmethod
    def _within_teacher(cls, seq_len: int, info: ValidationInfo) -> int:
        longest = (info.context or {}).get("max_positions")
        if longest is not None and seq_len > longest:
            raise problem("is longer than the {} positions that the teacher was made for", longest)
        return seq_len
