"""What this machine is, and whether something else computes on it."""

import os
import time
from pathlib import Path

# Share of all processors above which something else runs: what a system does by itself stays below.
QUIET = 0.05
LOOK_SECONDS = 1.0


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def description() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 1e9), "kernel": os.uname().release}


def _jiffies() -> tuple[int, int]:
    """Busy and all ticks of all processors; what waits for a disk is not busy, what another guest took is."""
    user, nice, system, idle, waiting, *others = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + waiting


def busy_share() -> float:
    """Share of all processors that computed during a look of a second, in which this program sleeps."""
    busy, total = _jiffies()
    time.sleep(LOOK_SECONDS)
    busy_after, total_after = _jiffies()
    return (busy_after - busy) / max(total_after - total, 1)


def load() -> list[float]:
    return [round(each, 2) for each in os.getloadavg()]


def look(what: str) -> dict:
    """Load and busy share before a measurement, with a warning where it will not be alone."""
    busy = busy_share()
    if busy > QUIET:
        print(f"WARNING: {100 * busy:.0f} % of the processors are busy before {what} (load {load()[0]}): its times are worth nothing", flush=True)
    return {"busy_share": round(busy, 3), "load": load()}
