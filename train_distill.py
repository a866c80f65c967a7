"""Convert a teacher: calibrate, align, distill. Runs alone or under a launcher (deepspeed, torchrun).

python train_distill.py --teacher DIR --data train.jsonl --val val.jsonl --out RUN stages.align.tokens=600k
deepspeed train_distill.py --teacher Qwen3-14B --variant multi-card
python train_distill.py --hostfile hosts --teacher Qwen3-14B --variant multi-card
"""

import sys

from rwkvinside.cli import train
from rwkvinside.cli.arguments import ArgumentParser
from rwkvinside.errors import report_errors


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run `rwkvinside train`; launchers start this script again."""
    return train.main(ArgumentParser("train_distill.py", __doc__), sys.argv[1:] if argv is None else argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
