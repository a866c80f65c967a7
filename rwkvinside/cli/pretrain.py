"""`rwkvinside pretrain` and `train_rwkv.py`: train a language model of RWKV and attention layers from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ArgumentParser, at_least
from .train import add_run_arguments, run

if TYPE_CHECKING:
    from ..config.schema import Config


def main(parser: ArgumentParser, argv: Sequence[str], script: str | None = None) -> int:
    """Train, print the plan, or hand over to DeepSpeed's launcher.

    Args:
        parser: a new one.
        argv: the arguments.
        script: path of the calling script, which a launcher starts on every host; None is `python -m rwkvinside`.
    """
    _add_arguments(parser)
    args = parser.parse(argv)

    def configure() -> Config:
        from ..lm.build import load_lm_config

        return load_lm_config(
            args.config,
            train=args.train_file,
            val=args.val_file,
            out=str(Path(args.output_dir) / (args.experiment_name or Path(args.config).stem)),
            max_seq_length=args.max_seq_length,
            seed=args.seed,
            overrides=args.overrides,
        )

    again = [*([script] if script else ["--module", "rwkvinside", "pretrain"]), *argv]
    kept = [word for word in argv if word != "--resume" and not word.startswith("--local")]  # the launcher's
    return run(args, configure, again, lambda _: [parser.prog, *kept, "--resume"])


def _add_arguments(parser: ArgumentParser) -> None:
    def add(name: str, **options) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **options)

    parser.add_argument(
        "-c",
        "--config",
        default="model_3b_rwkv",
        metavar="FILE",
        help="YAML file, or a shipped model: tiny, model_3b, model_3b_rwkv (default: the last one)",
    )
    add("output_dir", default="outputs", metavar="DIR", help="folder of all runs (default: outputs)")
    add("experiment_name", metavar="NAME", help="of the run's folder in it (default: the configuration's)")
    add("train_file", action="append", default=[], metavar="SOURCE", help="texts to train on; may repeat")
    add("val_file", action="append", default=[], metavar="SOURCE", help="texts to validate on; may repeat")
    add("max_seq_length", type=at_least(2), metavar="N", help="tokens of a row (default: the configuration's)")
    parser.add_argument(
        "--seed", type=at_least(0), metavar="N", help="of weights and order of the data (default: the configuration's)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any field, as in stages.pretrain.tokens=2M (docs/lm.md)"
    )
    add_run_arguments(parser)
