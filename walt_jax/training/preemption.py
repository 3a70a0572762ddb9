"""Being preempted: a notice to one process makes all of them save at the same step and leave."""

import json
import logging
import os
import signal
import threading
import urllib.request
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)
_QUESTION = "/computeMetadata/v1/instance/?recursive=true"
_NO = ("", "NONE", "FALSE")


class Preemption:
    """Waits for SIGTERM and for Cloud's maintenance notice; a context manager.

    Between several processes jax's preemption sync carries the notice, and chooses the step after
    the furthest one that any of them has begun.
    """

    def __init__(self, period: float = 5.0) -> None:
        """`period`: seconds between two looks at the machine's metadata server."""
        self._period, self._told = period, False
        self._synced = jax.distributed.is_initialized()
        self._before: Any = None
        self._ended = threading.Event()

    def __enter__(self) -> "Preemption":
        # With several processes jax has set its own handler.
        if not self._synced and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        if host := metadata_server():
            threading.Thread(
                target=_watch, args=(host, self._ended, self._period), daemon=True
            ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and leave after `step` updates; asked once after every step."""
        if self._synced:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._told = True


def metadata_server() -> str:
    """HOST of the machine's metadata server; empty where there is none (no Cloud machine)."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    tpu = any(device.platform == "tpu" for device in jax.local_devices())
    return "metadata.google.internal" if tpu else ""


def notice(host: str, timeout: float = 5.0) -> str:
    """What the metadata server says is coming: `maintenance-event`, `preempted`; else empty.

    Raises:
      OSError: it does not answer.
    """
    request = urllib.request.Request(
        f"http://{host}{_QUESTION}", headers={"Metadata-Flavor": "Google"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        about = json.loads(response.read())
    for key in ("preempted", "maintenanceEvent"):
        if str(about.get(key, "")).upper() not in _NO:
            return f"{key}={about[key]}"
    return ""


def _watch(host: str, ended: threading.Event, period: float) -> None:
    """Passes a notice on as SIGTERM, once."""
    while not ended.wait(period):
        try:
            told = notice(host)
        except (OSError, ValueError):
            continue
        if told:
            logger.warning("the machine is to be taken away (%s): saving and leaving", told)
            os.kill(os.getpid(), signal.SIGTERM)
            return
