"""Processes of one torch.distributed group (gloo), kept for all tests of a session: each takes seconds to start."""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

SECONDS = 120
SECONDS_AFTER_A_FAILURE = 10


class Ranks:
    """Runs functions in every process of a group; ``run`` returns what they returned, by rank."""

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._results: Any = context.Queue()
        self._tasks: list[Any] = [context.Queue() for _ in range(self._size)]
        meeting_point = str(Path(self._folder.name) / "meet")
        self._processes = [
            context.Process(target=_serve, args=(rank, self._size, meeting_point, tasks, self._results), daemon=True)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function of a module in every process, seeded alike.

        Raises:
            AssertionError: One of them raised, or did not answer; the message says so, with tracebacks.
        """
        for tasks in self._tasks:
            tasks.put((function, args, os.environ.get("FUSED_CLR_BACKEND")))
        answers: dict[int, tuple[Any, str | None]] = {}
        while len(answers) < self._size:
            # The others may wait for the one that failed, for ever.
            failed = any(error for _, error in answers.values())
            try:
                rank, answer = self._results.get(timeout=SECONDS_AFTER_A_FAILURE if failed else SECONDS)
            except queue.Empty:
                self.close(waits=False)
                self._start()
                break
            answers[rank] = answer
        silent = dict.fromkeys(range(self._size), (None, "no answer"))
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in (silent | answers).items() if error]
        assert not failures, "\n".join(failures)
        return [answers[rank][0] for rank in range(self._size)]

    def close(self, waits: bool = True) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            if waits:
                process.join(timeout=20)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, meeting_point: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    # As torchrun does, which frameworks look at.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    while (task := tasks.get()) is not None:
        function, args, backend = task
        if backend is None:
            os.environ.pop("FUSED_CLR_BACKEND", None)
        else:
            os.environ["FUSED_CLR_BACKEND"] = backend
        torch.manual_seed(0)
        try:
            results.put((rank, (function(*args), None)))
        except Exception:
            results.put((rank, (None, traceback.format_exc())))
    dist.destroy_process_group()
