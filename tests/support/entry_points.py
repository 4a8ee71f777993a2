"""Installed packages, as far as entry points go."""

from __future__ import annotations

from pathlib import Path


def install(site: Path, entry_points: str, name: str = "my-parts") -> None:
    """Write a package's metadata into `site`, as pip does; its modules lie there as well."""
    metadata = site / f"{name.replace('-', '_')}-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(entry_points)
