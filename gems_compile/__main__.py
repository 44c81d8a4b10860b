"""``python -m gems_compile demo``, ``doctor``, ``ops`` or ``cache``."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    if args.command == "cache":
        from .cache import main as cache

        return cache(args.clear, args.json)
    _choose_target(argv)
    if args.command == "demo":
        from .demo import main as demo

        return demo(None if args.no_dump else args.dump, args.json)
    if args.command == "ops":
        from .catalogue import main as catalogue

        return catalogue(args.json, args.markdown, args.only)
    from .doctor import main as doctor

    return doctor(args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gems_compile", description="gems-compile")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a small Llama-style model, eager beside gems")
    demo.add_argument(
        "--dump",
        default="gems_dump",
        metavar="DIR",
        help="where every stage of the compile is written (default: ./gems_dump)",
    )
    demo.add_argument("--no-dump", action="store_true", help="write no files")
    doctor = commands.add_parser("doctor", help="versions, target, cache, and a self-test")
    cache = commands.add_parser("cache", help="what the caches hold: kernels and whole graphs")
    cache.add_argument("--clear", action="store_true", help="remove it")
    ops = commands.add_parser("ops", help="what eager mode can serve, and what it does by default")
    ops.add_argument("--markdown", action="store_true", help="print docs/ops.md")
    ops.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="as enable(only=...) takes them"
    )
    for command in (demo, doctor, ops, cache):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _choose_target(argv: Sequence[str]) -> None:
    """Without a GPU, run kernels in Triton's interpreter.

    Triton reads the variable once, when it is first imported, so it is set before torch comes in;
    and where a device file is there but torch finds no GPU behind it, this process starts again.
    """
    from .config import vendor

    if "TRITON_INTERPRET" in os.environ or vendor() is not None:
        return
    if not _may_have_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
        return
    from .kernels.target import current_target

    if current_target() is None:
        print("torch finds no GPU: kernels run in Triton's interpreter", file=sys.stderr)
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "gems_compile", *argv])


def _may_have_gpu() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    devices = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd") + glob.glob("/dev/dxg")
    return bool(devices) or shutil.which("nvidia-smi") is not None


if __name__ == "__main__":
    raise SystemExit(main())
