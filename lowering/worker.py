"""A compile worker: source files in, cubins out. Imports Triton, never torch.

Speaks JSON lines: {"path", "meta", "target"} -> {"path", "error"}. Run as
``python -m gems_compile.lowering.worker``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from typing import Any


def load_module(path: str) -> Any:
    """Import a generated file (Triton reads its source back from the file)."""
    name = "gems_" + os.path.basename(path).partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # for any file whose name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_atomically(path: str, data: bytes) -> None:
    temporary = f"{path}.{uuid.uuid4().hex}"
    with open(temporary, "wb") as f:
        f.write(data)
    os.replace(temporary, path)


def compile_file(path: str, meta: dict[str, Any], target: list[Any]) -> None:
    """Compile one kernel file for ``target`` = [backend, arch, warp size]; binary beside it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(path), meta["name"])
    signature = dict(meta["signature"])
    names = [*signature, *meta["constants"]]
    signature.update(dict.fromkeys(meta["constants"], "constexpr"))
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, n in enumerate(names)
        if signature[n].startswith("*") and n not in meta.get("unaligned", ())
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): c for n, c in meta["constants"].items()},
        attrs=aligned,
    )
    options = {
        "num_warps": meta["num_warps"],
        "num_stages": meta.get("num_stages", 1),
        "enable_fp_fusion": not meta["exact"],
    }
    kernel = triton.compile(source, target=GPUTarget(*target), options=options)
    facts = kernel.metadata
    binary = "cubin" if target[0] == "cuda" else "hsaco"
    stem = path.removesuffix(".py")
    write_atomically(f"{stem}.{binary}", kernel.asm[binary])
    record = {
        "name": facts.name,
        "num_warps": facts.num_warps,
        "shared": facts.shared,
        "hash": kernel.hash,
        "num_ctas": getattr(facts, "num_ctas", 1),
        "global_scratch_size": getattr(facts, "global_scratch_size", None),
        "profile_scratch_size": getattr(facts, "profile_scratch_size", None),
        "binary": f"{os.path.basename(stem)}.{binary}",
    }
    write_atomically(f"{stem}.json", json.dumps(record).encode())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Triton prints must not mix with the answers
    for line in sys.stdin:
        job = json.loads(line)
        error = None
        try:
            compile_file(job["path"], job["meta"], job["target"])
        except Exception as e:
            error = f"{type(e).__name__}: {e}"[:2000]
        answers.write(json.dumps({"path": job["path"], "error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
