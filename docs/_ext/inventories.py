"""Inventories of other projects for intersphinx, made of the table `inventories.txt`.

The build fetches nothing. Most projects ship no inventory in their packages, so the table
names what our pages refer to, and nothing else: `project address`, then `role name page`.
"""

import zlib
from pathlib import Path

TABLE = Path(__file__).parents[1] / "inventories.txt"


def inventories(folder):
    """Write one inventory a project into a folder: -> the value of `intersphinx_mapping`."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping, entries = {}, {}
    for line in TABLE.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if not line.startswith(" "):
            project, address = line.split()
            mapping[project], entries[project] = (address, str(folder / f"{project}.inv")), []
        else:
            role, name, page = line.split()
            shown = name.split(".")[-1] if role.startswith("std") else "-"
            entries[project].append(f"{name} {role} 1 {page} {shown}\n")
    for project, lines in entries.items():
        header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n"
        header += "# The remainder of this file is compressed using zlib.\n"
        content = zlib.compress("".join(lines).encode())
        (folder / f"{project}.inv").write_bytes(header.encode() + content)
    return mapping
