"""How much memory a program gets on the devices that people ask about, and how much this machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass

GB = 1 << 30


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        memory: its memory in bytes.
        share: the share of it that one program may use.
        reason: where the share comes from.
    """

    memory: int
    share: float
    reason: str

    @property
    def usable(self) -> int:
        """Bytes that one program may use."""
        return int(self.memory * self.share)


# iOS ends an app that goes above its limit. With the increased-memory-limit entitlement, os_proc_available_memory() was
# reported as 6 GB on an iPhone 15 Pro with 8 GB (github.com/introlab/rtabmap/pull/1446), as 4.2 GB on an iPhone 13 Pro
# with 6 GB (github.com/a-ghorbani/pocketpal-ai/pull/651), and the limit as 12 of 16 GB on an iPad Pro
# (macrumors.com/2021/09/17/ipados-15-up-to-12gb-ram-high-end-ipad-pro). Without the entitlement it is near a half.
IOS = "the app's limit with the increased-memory-limit entitlement, as developers report it"
# Metal's recommendedMaxWorkingSetSize, which MLX may wire: 10,922.67 of 16,384 MB and 21,845.34 of 32,768 MB in logs of
# llama.cpp and ollama (github.com/abetlen/llama-cpp-python/issues/687, github.com/ollama/ollama/issues/434).
MACOS = "Metal's recommended working set, two thirds of the memory"
# There is no fixed limit for native memory; the low-memory killer acts when the system runs short of it. The makers'
# systems take 3 GB and more, so a half is left with other apps closed. A rule of thumb, not a measurement.
ANDROID = "a rule of thumb: the system and its low-memory killer leave about half"
# A desktop with a browser open keeps some 4 GB. A rule of thumb too.
PC = "a rule of thumb: the desktop and a browser keep a quarter"

DEVICES = {
    "iphone-6gb": Device(6 * GB, 0.70, IOS),
    "iphone-8gb": Device(8 * GB, 0.75, IOS),
    "ipad-16gb": Device(16 * GB, 0.75, IOS),
    "mac-8gb": Device(8 * GB, 2 / 3, MACOS),
    "mac-16gb": Device(16 * GB, 2 / 3, MACOS),
    "mac-32gb": Device(32 * GB, 2 / 3, MACOS),
    "android-8gb": Device(8 * GB, 0.5, ANDROID),
    "android-12gb": Device(12 * GB, 0.5, ANDROID),
    "pc-16gb": Device(16 * GB, 0.75, PC),
}


def all_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
