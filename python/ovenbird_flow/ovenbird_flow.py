"""The flow that `ovenbird build --on prefect` runs: it starts `ovenbird worker` where a Prefect worker is, and tells how the build goes.

The parameters of the flow are the fields of a build request (docs/guides/prefect.md), so that a build can also be started from Prefect's
own page or command line. It needs nothing but Prefect and the program `ovenbird`, on the PATH or where the variable OVENBIRD_PROGRAM says.

Secrets are asked for by name while the build runs: first the Prefect block `ovenbird-ID` of the type Secret, then the variable
OVENBIRD_SECRET_ID. They go through a pipe, and are in no parameter, log, argument or file.

What the worker says goes to Prefect twice: as lines for people, and byte for byte in records below DEBUG, for the caller who waits. The
build stops when the flow run is cancelled, and when this process dies in any way: the worker's standard input ends then.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from datetime import datetime, timezone
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelled

#: Version of the records for the caller. That of the protocol of workers is the worker's and its caller's business.
RECORDS = 1
#: Level of the records for the caller: below DEBUG.
LEVEL = 5
#: What such a record begins with.
MARK = "ovenbird-wire"
#: Bytes of a record before they are packed: Prefect takes no records of any length.
PIECE = 256 * 1024
#: Seconds between two records.
INTERVAL = 0.4
#: Seconds between two looks whether the run is to be cancelled.
LOOK = 2.0
#: Seconds that the worker may take to stop.
GRACE = 6.0
#: Lines that an error shows.
TAIL = 50


class BuildFailed(Exception):
    """The build failed: why, and the last lines."""


class WorkerLost(Exception):
    """`ovenbird worker` could not be started, or ended without a result."""


class Wire:
    """Passes the worker's words on to Prefect, in order and with nothing lost, and looks whether the run is to be cancelled."""

    def __init__(self, run: str, cancel) -> None:
        self._run, self._cancel = run, cancel
        self._waiting = bytearray()
        self._ended = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._watch)]
        for thread in self._threads:
            thread.start()

    def write(self, line: bytes) -> None:
        with self._changed:
            self._waiting += line
            self._changed.notify_all()

    def close(self) -> None:
        """Waits until everything is with Prefect."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._threads[0].join(60)

    def _send(self) -> None:
        number = 0
        with get_client(sync_client=True) as client:
            while True:
                with self._changed:
                    while not self._waiting and not self._ended:
                        self._changed.wait()
                    if not self._waiting:
                        return
                    piece = bytes(self._waiting[:PIECE])
                    del self._waiting[:PIECE]
                packed = base64.b64encode(gzip.compress(piece, 6, mtime=0)).decode()
                record = {
                    "name": MARK,
                    "level": LEVEL,
                    "message": f"{MARK} {RECORDS} {number} {packed}",
                    "timestamp": datetime.now(timezone.utc).isoformat(),
                    "flow_run_id": self._run,
                }
                number += 1
                self._post(client, record)
                with self._changed:
                    # Many small pieces cost the server more than they tell the caller.
                    if not self._ended and len(self._waiting) < PIECE:
                        self._changed.wait_for(lambda: self._ended, INTERVAL)

    @staticmethod
    def _post(client, record: dict[str, Any]) -> None:
        for pause in (0.5, 1, 2, 4, 8, None):
            try:
                client.create_logs([record])
                return
            except Exception:  # noqa: BLE001 - whatever it was, the build must not end because of its log
                if pause is None:
                    return
                time.sleep(pause)

    def _watch(self) -> None:
        with get_client(sync_client=True) as client:
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: self._ended, LOOK):
                        return
                try:
                    state = client.read_flow_run(self._run).state
                except Exception:  # noqa: BLE001 - asked again
                    continue
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    self._cancel()
                    return


class Worker:
    """`ovenbird worker` as a child of this process."""

    def __init__(self) -> None:
        program = os.environ.get("OVENBIRD_PROGRAM") or shutil.which("ovenbird")
        if program is None:
            raise WorkerLost("there is no program `ovenbird` here: install it, or say where it is with the variable OVENBIRD_PROGRAM")
        try:
            self._child = subprocess.Popen(
                [program, "worker", "--builder", "engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerLost(f"cannot start {program}: {error}") from error
        self._lock = threading.Lock()
        self.cancelled = threading.Event()

    def say(self, message: dict[str, Any], raw: bytes = b"") -> None:
        try:
            with self._lock:
                self._child.stdin.write(json.dumps(message).encode() + b"\n" + raw)
                self._child.stdin.flush()
        except (OSError, ValueError):
            pass  # It is gone, which its output says, too.

    def lines(self):
        return iter(self._child.stdout.readline, b"")

    def errors(self):
        return iter(self._child.stderr.readline, b"")

    def cancel(self) -> None:
        """Stops the build in order, and without any after a while."""
        self.cancelled.set()
        self.say({"type": "cancel"})
        threading.Timer(GRACE, self.kill).start()

    def kill(self) -> None:
        if self._child.poll() is None:
            try:
                os.killpg(self._child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def end(self) -> int:
        """Closes its input, which ends it, and waits."""
        with self._lock:
            try:
                self._child.stdin.close()
            except OSError:
                pass
        try:
            return self._child.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._child.wait()


class Lines:
    """Events of a build as lines for people."""

    def __init__(self, logger) -> None:
        self._logger = logger
        self._names: dict[int, str] = {}
        self._partial: dict[int, str] = {}

    def show(self, event: dict[str, Any]) -> None:
        kind, vertex = event.get("event"), event.get("vertex")
        name = self._names.get(vertex, f"#{vertex}")
        if kind == "started":
            self._names[vertex] = event["name"]
            self._logger.info("%s", event["name"])
        elif kind == "cached":
            self._logger.info("CACHED %s", event["name"])
        elif kind == "log":
            *whole, rest = (self._partial.get(vertex, "") + event["text"]).split("\n")
            self._partial[vertex] = rest[-16384:]
            for line in whole:
                self._logger.info("%s", line.rstrip("\r"))
        elif kind == "finished":
            self._flush(vertex)
            self._logger.debug("DONE %s", name)
        elif kind == "failed":
            self._flush(vertex)
            self._logger.error("%s: %s", name, event["error"])
        elif kind == "warning":
            self._logger.warning("%s: %s", event["code"], event["message"])
        elif kind == "message":
            self._logger.info("%s", event["text"])
        elif kind == "isolation":
            self._logger.info("isolation: %s", event["level"])

    def _flush(self, vertex: int) -> None:
        rest = self._partial.pop(vertex, "")
        if rest:
            self._logger.info("%s", rest)


def _secret(identifier: str) -> bytes | None:
    from prefect.blocks.system import Secret

    block = "ovenbird-" + re.sub(r"[^a-z0-9]+", "-", identifier.lower()).strip("-")
    try:
        value = Secret.load(block).get()
    except ValueError:  # There is no such block.
        value = os.environ.get("OVENBIRD_SECRET_" + re.sub(r"[^A-Z0-9]", "_", identifier.upper()))
    if value is None:
        return None
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _answer(worker: Worker, message: dict[str, Any]) -> None:
    question, found, reason = message.get("question"), None, "it is not known here"
    if isinstance(question, dict) and "secret" in question:
        identifier = question["secret"]["id"]
        try:
            found = _secret(identifier)
            slug = re.sub(r"[^a-z0-9]+", "-", identifier.lower()).strip("-")
            variable = re.sub(r"[^A-Z0-9]", "_", identifier.upper())
            reason = f"Prefect has no Secret block ovenbird-{slug}, and the worker no variable OVENBIRD_SECRET_{variable}"
        except Exception as error:  # noqa: BLE001 - said, without its text, which may show the value
            reason = f"the Secret block cannot be read ({type(error).__name__})"
    if found is None:
        worker.say({"type": "answer", "id": message["id"], "answer": {"refused": reason}, "bytes": 0})
    else:
        worker.say({"type": "answer", "id": message["id"], "answer": "bytes", "bytes": len(found)}, found)


def _told(failure: dict[str, Any]) -> str:
    """A failure for people, with the last lines of the step."""
    text = ": ".join([failure["message"], *failure.get("causes", [])])
    tail = ((failure.get("detail") or {}).get("step") or {}).get("tail") or []
    text += "".join(f"\n  | {line}" for line in tail[-TAIL:])
    return text + "".join(f"\nhint: {hint}" for hint in failure.get("hints", []))


@flow(name="ovenbird-build", persist_result=False, validate_parameters=False)
def build(
    source: Any = None,
    version: Any = 1,
    dockerfile: Any = None,
    contexts: Any = None,
    names: Any = None,
    target: Any = None,
    build_args: Any = None,
    labels: Any = None,
    annotations: Any = None,
    platforms: Any = None,
    if_needed: Any = None,
    force: Any = None,
    no_cache: Any = None,
    no_cache_filter: Any = None,
    pull: Any = None,
    cache_from: Any = None,
    cache_to: Any = None,
    outputs: Any = None,
    secrets: Any = None,
    allow_leak: Any = None,
    ssh: Any = None,
    network: Any = None,
    add_hosts: Any = None,
    dns: Any = None,
    hostname: Any = None,
    allow: Any = None,
    limits: Any = None,
    reproducible: Any = None,
    parallel: Any = None,
    tags: Any = None,
    workflow: Any = None,
    caller: Any = None,
) -> Any:
    """Build an image. The parameters are the fields of a build request; `caller` is what only the caller of a build can know."""
    request = {name: value for name, value in locals().items() if name != "caller" and value is not None}
    logger = get_run_logger()
    worker = Worker()
    wire = Wire(str(flow_run.id), worker.cancel)
    lines = Lines(logger)
    said: deque[str] = deque(maxlen=TAIL)
    report = failure = None

    def listen() -> None:
        for line in worker.errors():
            said.append(line.decode(errors="replace").rstrip())
            logger.warning("%s", said[-1])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        for line in worker.lines():
            message = json.loads(line)
            kind = message.get("type")
            if kind == "ask":
                _answer(worker, message)
                continue
            wire.write(line)
            if kind == "hello":
                worker.say({"type": "hello", "protocol": message["protocol"], "version": "ovenbird_flow", "capabilities": []})
                worker.say({"type": "errand", "request": request, "caller": caller})
            elif kind == "event":
                lines.show(message["event"])
            elif kind == "report":
                report = message["report"]
            elif kind == "failed":
                failure = message["failure"]
    finally:
        code = worker.end()
        listener.join(1)
        wire.close()
    if report is not None:
        logger.info("%s %s", report["digest"], " ".join(report.get("pushed") or report.get("names") or []))
        return {"digest": report["digest"], "names": report.get("names", []), "pushed": report.get("pushed", [])}
    if worker.cancelled.is_set():
        return Cancelled(message="the build was cancelled")
    if failure is not None:
        raise BuildFailed(_told(failure))
    raise WorkerLost(f"ovenbird worker ended with code {code}" + "".join(f"\n  | {line}" for line in said))
