"""Processes of one torch.distributed group (gloo), kept for all tests of a session: each takes seconds to start."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

SECONDS = 240


class Ranks:
    """Runs functions in every process of a group; ``run`` returns what they returned, by rank."""

    def __init__(self, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._results: Any = context.Queue()
        self._tasks: list[Any] = [context.Queue() for _ in range(size)]
        meeting_point = str(Path(self._folder.name) / "meet")
        self._processes = [
            context.Process(target=_serve, args=(rank, size, meeting_point, tasks, self._results), daemon=True)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function of a module in every process, seeded alike.

        Raises:
            AssertionError: One of them raised; the message is its traceback.
        """
        for tasks in self._tasks:
            tasks.put((function, args, os.environ.get("FUSED_CLR_BACKEND")))
        answers = dict(self._results.get(timeout=SECONDS) for _ in self._tasks)
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(answers.items()) if error]
        assert not failures, "\n".join(failures)
        return [answers[rank][0] for rank in range(len(self._tasks))]

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, meeting_point: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
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
