"""Processor, memory, disk, network and GPU of the machine a run uses, sampled into the run's journal.

MLflow's own monitor asks the server before each sample and gives up when it is away; its gauges are reused here.
"""

import threading
import time
from collections.abc import Callable, Mapping

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

INTERVAL = 10.0  # seconds between samples


class SystemSampler(threading.Thread):
    """Reports every INTERVAL seconds until `stop()`, and once more then, so that a short run has a sample too."""

    def __init__(self, log: Callable[[int, Mapping[str, float]], None]):
        super().__init__(name="system-sampler", daemon=True)
        self._log = log
        self._gauges = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_gpus()]
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(INTERVAL):
            self._sample()

    def stop(self) -> None:
        self._stop_asked.set()
        self._sample()

    def _sample(self) -> None:
        values = {}
        for gauge in self._gauges:
            gauge.collect_metrics()
            values |= {f"system/{name}": value for name, value in gauge.aggregate_metrics().items()}
            gauge.clear_metrics()
        self._log(int(time.time()), values)  # the second is the step: it goes on when a killed run goes on


def _gpus() -> list[GPUMonitor]:
    try:
        return [GPUMonitor()]
    except (ImportError, RuntimeError):  # no NVIDIA library, or no GPU
        return []
