"""Convert a teacher: calibrate, align, distill. Runs alone or under a launcher (deepspeed, torchrun).

python train_distill.py --teacher DIR --data train.jsonl --val val.jsonl --out RUN stages.align.tokens=600k
deepspeed train_distill.py --teacher Qwen3-14B
python train_distill.py --hostfile hosts --teacher Qwen3-14B
"""

import argparse
import os
import sys

from rwkvinside.cli.arguments import add_config_arguments, config_from
from rwkvinside.errors import report_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone, from what the stages before it left")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output directory")
    parser.add_argument(
        "--resume-from", metavar="STEP", help="continue from this checkpoint, for instance step-00000150"
    )
    parser.add_argument(
        "--hostfile", metavar="FILE", help="start on several machines with DeepSpeed's launcher, once all answer"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan; load no weights, write nothing")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # appended by the launcher
    return parser.parse_intermixed_args(argv)


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = config_from(args, args.stage)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    ranks, hosts = int(os.environ.get("WORLD_SIZE", "1")), {}
    if args.hostfile and not launched:
        from rwkvinside.training.launch import check_hosts, launch, read_hostfile

        hosts = read_hostfile(args.hostfile)
        ranks = sum(hosts.values())
    if args.dry_run:
        from rwkvinside.config.resolve import resolve
        from rwkvinside.planning.plan import plan_text

        plan = resolve(config, [args.stage] if args.stage else None, ranks)
        print(plan_text(plan, config), end="")
        return 0
    if hosts:
        check_hosts(hosts)
        launch(args.hostfile, sys.argv if argv is None else [__file__, *argv])
    from rwkvinside.conversion.run import train

    train(config, stage=args.stage, resume=args.resume, resume_from=args.resume_from, launched=launched)
    return 0


if __name__ == "__main__":
    sys.exit(main())
