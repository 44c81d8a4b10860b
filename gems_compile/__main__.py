"""``python -m gems_compile``, or ``gems``: ``docs/dumps.md`` has the commands and exit codes."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import GemsError, nearest, unknown
from .lowering.progress import Waiting

GOOD, WRONG, MISTAKE = 0, 1, 2  # exit codes

Add = Callable[..., argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parsed(argv)
    if args.interprets:
        _choose_target(argv)
    try:
        code: int = args.run(args)
    except GemsError as error:
        return _mistake(error)
    except ValueError as error:
        from .kernels.target import UnknownVendor  # of GEMS_VENDOR

        if not isinstance(error, UnknownVendor):
            raise
        return _mistake(error)
    return code


def _mistake(error: Exception) -> int:
    print(error, file=sys.stderr)
    return MISTAKE


# what there is to say ----------------------------------------------------------------------------


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        parser.error(unknown("command", argv[0], commands))
    args, left = parser.parse_known_args(argv)
    if left:
        command = commands[args.command]
        known = [name for name in command._option_string_actions if name.startswith("--")]
        command.error(f"{left[0]} is not known here{nearest(left[0], known)}")
    return args


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="gems",
        description="gems-compile: what it does to a program, and what this machine has",
        epilog="exit codes: 0 good; 1 wrong numbers, a failed self-test or a failed script; "
        "2 a mistake in the call",
    )
    commands: dict[str, argparse.ArgumentParser] = {}
    made = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], says: str, interprets: bool = True
    ) -> argparse.ArgumentParser:
        command = made.add_parser(name, help=says, description=says)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run, interprets=interprets)
        commands[name] = command
        return command

    for declare in (_demo, _doctor, _explain, _page, _ops, _targets, _cache, _bench):
        declare(add)
    return parser, commands


def _demo(add: Add) -> None:
    def run(args: Any) -> int:
        from .commands.demo import main as demo

        return demo(None if args.no_dump else args.dump, args.json)

    command = add("demo", run, "a small Llama-style model, eager beside gems")
    command.add_argument(
        "--dump",
        default="gems_dump",
        metavar="DIR",
        help="where every stage of the compile is written (default: ./gems_dump)",
    )
    command.add_argument("--no-dump", action="store_true", help="write no files")


def _doctor(add: Add) -> None:
    def run(args: Any) -> int:
        with Waiting("The self-test compiles and runs"):
            from .commands.doctor import examine, main

            found = examine()
        return main(args.json, found)

    add("doctor", run, "versions, driver, target, caches, launcher, and a self-test")


def _explain(add: Add) -> None:
    def run(args: Any) -> int:
        from .commands.script import main as explain

        return explain(args.script, args.args, args.backend, args.json, args.html, args.why)

    command = add("explain", run, "run a script, and tell what became of what it compiles")
    command.add_argument(
        "--backend",
        choices=("gems",),
        help="compile what names no backend, or inductor, with this one",
    )
    command.add_argument("--html", metavar="FILE", help="write a page as well")
    command.add_argument(
        "--why", metavar="TEXT", help="print only the facts that hold it: a module, an op, a line"
    )
    command.add_argument("script", metavar="SCRIPT", help="as python takes it")
    command.add_argument(
        "args", nargs=argparse.REMAINDER, metavar="...", help="whatever follows is the script's"
    )


def _page(add: Add) -> None:
    def run(args: Any) -> int:
        from .page.of_dump import main as page

        return page(args.folder, args.out, args.json)

    says = "write a dump's page again, with the times of replay.py --bench"
    command = add("page", run, says, interprets=False)
    command.add_argument("folder", metavar="DIR", help="what GEMS_DUMP named")
    command.add_argument("--out", metavar="FILE", help="where to (default: DIR/index.html)")


def _ops(add: Add) -> None:
    def run(args: Any) -> int:
        with Waiting("The ops are looked up"):
            from .commands.catalogue import main as catalogue
        return catalogue(args.json, args.markdown, args.only)

    command = add("ops", run, "what eager mode can serve, and what it does by default")
    command.add_argument("--markdown", action="store_true", help="print docs/ops.md")
    command.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="as enable(only=...) takes them"
    )


def _targets(add: Add) -> None:
    def run(args: Any) -> int:
        with Waiting("The devices are looked up"):
            from .commands.targets import listed, main

            found = listed()
        return main(args.json, found)

    says = "what can be compiled for, and which target is chosen here"
    add("targets", run, says, interprets=False)


def _cache(add: Add) -> None:
    def run(args: Any) -> int:
        from .cache import main as cache

        return cache(args.clear, args.json)

    says = "what the caches hold: kernels and whole graphs"
    command = add("cache", run, says, interprets=False)
    command.add_argument("--clear", action="store_true", help="remove it")


def _bench(add: Add) -> None:
    def run(args: Any) -> int:
        from .commands.bench import main as bench

        return bench(args.name, args.args, args.json)

    command = add("bench", run, "list the benchmarks, or run one", interprets=False)
    command.add_argument("name", nargs="?", metavar="NAME", help="which one to run")
    command.add_argument(
        "args", nargs=argparse.REMAINDER, metavar="...", help="whatever follows is the benchmark's"
    )


# where it runs -----------------------------------------------------------------------------------


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
