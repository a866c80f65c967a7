"""Train a language model of RWKV and attention layers from nothing. Runs alone or under a launcher.

python train_rwkv.py --config configs/lm/tiny.yaml --output_dir DIR --train_file train.txt --val_file val.txt
python train_rwkv.py --config configs/lm/model_3b_rwkv.yaml --dry_run
deepspeed train_rwkv.py --output_dir DIR --train_file train.jsonl --val_file val.jsonl
"""

import sys

from rwkvinside.cli import pretrain
from rwkvinside.cli.arguments import ArgumentParser
from rwkvinside.errors import report_errors


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run `rwkvinside pretrain`; launchers start this script again."""
    return pretrain.main(ArgumentParser("train_rwkv.py", __doc__), sys.argv[1:] if argv is None else argv, __file__)


if __name__ == "__main__":
    sys.exit(main())
