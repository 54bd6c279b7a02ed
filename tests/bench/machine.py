"""What this machine is, and whether something else computes on it."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

# Share of all processors above which something else runs: what a system does by itself stays below.
QUIET = 0.05
LOOK_SECONDS = 1.0


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def gpu() -> str | None:
    """Name and driver of the first GPU; None where no driver answers."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class GpuMemory:
    """Within it the driver is asked twenty times a second how much of the first GPU's memory is in use, by whomever."""

    def __enter__(self) -> "GpuMemory":
        self.samples = tempfile.TemporaryFile("w+")
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=50"]
        self.asking = subprocess.Popen(asked, stdout=self.samples, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        self.asking.terminate()
        self.asking.wait()

    def most_bytes(self) -> int:
        self.samples.seek(0)
        found = [int(line) for line in self.samples.read().split() if line.isdigit()]
        return max(found, default=0) << 20


def cores() -> set[int]:
    """Those that this process may use."""
    return os.sched_getaffinity(0)


def description() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = {"gpu": gpu()} if gpu() else {}
    return {**device, "processor": processor(), "cores": len(cores()), "memory_gb": round(memory / 1e9), "kernel": os.uname().release}


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
