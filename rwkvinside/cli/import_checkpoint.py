"""`rwkvinside import CHECKPOINT --teacher DIR --out RUN`: a checkpoint of another program as a run."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import ArgumentParser


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Import, and print what was found."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="RWKV-Infer's .pth, a training file of the earlier project, HF shards"
    )
    parser.add_argument("--teacher", required=True, metavar="TEACHER", help="the model that it was made from")
    parser.add_argument("--out", required=True, metavar="RUN", help="run directory to create")
    parser.add_argument("--preset", metavar="NAME", help="its variant, where its tensors do not tell")
    parser.add_argument(
        "--attention-rope", choices=["true", "false"], help="whether attention that it keeps rotates, as --preset"
    )
    args = parser.parse(argv)
    from ..importers.run import import_checkpoint

    rope = None if args.attention_rope is None else args.attention_rope == "true"
    found = import_checkpoint(args.checkpoint, args.teacher, args.out, preset=args.preset, attention_rope=rope)
    print(f"wrote {args.out}: {found.preset}, {found.layout}, {found.tensors} tensors with names of {found.form}")
    if "A" in found.layout:
        print(f"attention that it keeps {'rotates' if found.attention_rope else 'does not rotate'}")
    print(f"from the teacher differ: {', '.join(found.changed)}")
    return 0
