"""A version in words, for the terminal."""

from collections.abc import Mapping
from typing import Any

from penstock.commands.align.config import show_seconds
from penstock.run.versions import Versions
from penstock.units import show_bytes


def version_text(row: Mapping[str, Any], versions: Versions) -> str:
    """What a round made, and what is served now."""
    new = row["new"]
    lines = [f"version {row['version']}: {row['decision']} ({show_seconds(row['seconds'])})", f"  {row['why']}"]
    lines.append(f"  new: {new['comparisons']:,} comparisons, {new['votes']:,} votes; {row['state']}")
    if "way" in row:
        learned = row["votes"]
        lines += [
            f"  learned by {' + '.join(row['way'])} from version {row['parent']}: {learned['comparisons']:,} "
            f"comparisons, {learned['votes']:,} votes; {row['why_way']}",
            *(f"  {'ok ' if check['passed'] else 'NOT'} {check['name']}: {check['shown']}" for check in row["checks"]),
            f"  memory: {show_bytes(row['memory']['planned'])} planned, {show_bytes(row['memory']['taken'])} taken",
        ]
    lines.append(f"served: version {versions.current}, {versions.model(versions.current)}")
    return "\n".join(lines)
