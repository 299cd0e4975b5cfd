"""A fresh process that measures one milestone, part after part, until it is told to stop."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection

from dev.bench.report import Report
from dev.bench.session import Task, run_task

START_S = 60.0
"""Most a process may take until it begins: libraries to import, not yet in the file cache."""


class PartFailedError(RuntimeError):
    """A part gave no result; the message says why."""


class Worker:
    """The process of one milestone. A part that fails or hangs ends it: what it leaves in memory
    would be missing for the next one."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._is_new = True
        self.is_alive = True

    def run(self, task: Task, budget_s: float) -> Report:
        """What ``run_task`` says; PartFailedError after ``budget_s`` seconds or when it fails."""
        limit = budget_s + (START_S if self._is_new else 0.0)
        self._is_new = False
        try:
            self._connection.send(task)
            if not self._connection.poll(limit):
                self.stop()
                raise PartFailedError(f"not done within its {budget_s:.0f} s")
            report, error = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.stop()
            code = self._process.exitcode
            raise PartFailedError(f"the process ended with exit code {code}") from None
        if error is not None:
            self.stop()
            raise PartFailedError(error)
        return report

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.is_alive = False
        self._connection.close()
        self._process.join(timeout=5.0)  # it ends by itself when nobody asks any more
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection) -> None:
    """The process: a report for each task, or what went wrong."""
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        try:
            reply: tuple[Report | None, str | None] = run_task(task), None
        except Exception as error:  # whatever it is, the parent goes on with the other parts
            traceback.print_exc()
            reply = None, f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        connection.send(reply)
