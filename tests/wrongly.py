"""Kernels that are wrong on purpose: what they store last is one too large."""

from __future__ import annotations

import re

import pytest

from gems_compile.lowering import pipeline

STORE = re.compile(r"(tl\.store\(.*?, )(\w+)((?:, \w+=.*)?\))$")


def one_more(text: str) -> str:
    """The kernel's text, its last store wrong."""
    lines = text.split("\n")
    last = max(k for k, line in enumerate(lines) if STORE.search(line))
    lines[last] = STORE.sub(r"\1\2 + 1\3", lines[last])
    return "\n".join(lines)


def make_wrong(monkeypatch: pytest.MonkeyPatch, part: str) -> list[str]:
    """From now on kernels whose names have this part are written wrong; returns their names."""
    right, names = pipeline.source_for, []

    def source_for(group, *args, **kwargs):
        source = right(group, *args, **kwargs)
        if part in source.name:
            source.text = one_more(source.text)
            names.append(source.name)
        return source

    monkeypatch.setattr(pipeline, "source_for", source_for)
    return names
