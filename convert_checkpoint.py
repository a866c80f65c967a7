"""Export a trained run in another format, verify that it computes the same, or import a checkpoint as a run.

python convert_checkpoint.py export RUN --to hf --out DIR
python convert_checkpoint.py verify DIR --against RUN
python convert_checkpoint.py import CHECKPOINT --teacher DIR --out RUN
"""

import sys

from rwkvinside.cli.arguments import ArgumentParser, run_command
from rwkvinside.cli.main import VERBS
from rwkvinside.errors import report_errors


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run `rwkvinside export`, `verify` or `import`."""
    verbs = {name: VERBS[name] for name in ("export", "verify", "import")}
    return run_command(ArgumentParser("convert_checkpoint.py", __doc__), sys.argv[1:] if argv is None else argv, verbs)


if __name__ == "__main__":
    sys.exit(main())
