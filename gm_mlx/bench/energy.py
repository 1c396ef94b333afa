"""Energy, where the system tells it: Linux counts what a processor package has used, in ``/sys/class/powercap``.

The counters (RAPL, of Intel's and AMD's processors) are of the whole package, so whatever else runs is in them and so
is what it takes to be idle. Since 2020 only root may read them, because they leak secrets (CVE-2020-8694). macOS gives
power to root alone, and as a program's text output; that is not read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6


@dataclass(frozen=True)
class Meter:
    """The counters of all packages.

    Attributes:
        counters: for each, the file with its microjoules and the number at which it begins again.
        silence: why there are none, in words that end a sentence; empty where there are some.
    """

    counters: tuple[tuple[Path, int], ...]
    silence: str = ""

    def read(self) -> list[int]:
        """What the counters say now, in microjoules."""
        return [int(path.read_text()) for path, _ in self.counters]

    def joules(self, before: list[int], after: list[int]) -> float | None:
        """What was used between two readings, where a counter began again at most once; None without counters."""
        if not self.counters:
            return None
        return MICRO * sum(
            (now - then) % around for (_, around), then, now in zip(self.counters, before, after, strict=True)
        )


def find_meter(folder: Path = POWERCAP, platform: str = sys.platform) -> Meter:
    """The counters that can be read here."""
    if platform != "linux":
        return Meter((), "this system tells it to root alone")
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            # Zones within a package ("core", "dram") and the whole board ("psys") would count things twice.
            if (zone / "name").read_text().startswith("package"):
                counter = zone / "energy_uj"
                int(counter.read_text())
                found.append((counter, int((zone / "max_energy_range_uj").read_text()) + 1))
        except PermissionError:
            return Meter((), f"only root may read {zone / 'energy_uj'}")
        except (OSError, ValueError):
            continue
    return Meter(tuple(found), "" if found else "this system has no counters of it")
