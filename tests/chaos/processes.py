"""Which processes there are, and who started them."""

import contextlib
from pathlib import Path


def processes() -> dict[int, tuple[int, bytes]]:
    """Parent and command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = parent, (entry / "cmdline").read_bytes()
    return found


def below(process: int) -> dict[int, bytes]:
    """All processes that a process started, with their command lines."""
    known, ours = processes(), {process}
    while grown := {child for child, (parent, _) in known.items() if parent in ours} - ours:
        ours |= grown
    return {child: known[child][1] for child in ours - {process}}
