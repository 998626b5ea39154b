"""Parameter server: the part of a run that holds weights and optimizer state for the workers.

It answers requests (server_messages.py) one after another, so a pull never sees half of an update.
Its key ranges (server_shards.py), one for each pp and tp coordinate, define what a push changes and
when a pull may be answered.

Invariant: under rules that update at every push, all ranges of a server have one version. So the
ranks of a worker always hold weights of the same one, and the copies of a replicated weight agree.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from minillm.base.arrays import Array
from minillm.base.metrics_file import SERVER_LOG, MetricsFile
from minillm.base.trace import Tracer
from minillm.comm.communicator import Communicator, Work
from minillm.replication.server_messages import DATA, FIELDS, HEADER, REPLY, Op, Request
from minillm.replication.server_shards import Shard, SyncShard

SLEEP_SECONDS = (50e-6, 1e-3)  # between looks for a request: a server that waits leaves its core


class Server:
    """Server that answers the workers on `wire`.

    `place(rank)` returns the worker and the shard of a rank of the wire. `own` is the rank of the
    worker in this process, None on a dedicated rank. Not collective.
    """

    def __init__(
        self,
        wire: Communicator,
        shards: Sequence[Shard],
        place: Callable[[int], tuple[int, int]],
        own: int | None = None,
    ) -> None:
        self.wire, self.shards, self.place, self.own = wire, list(shards), place, own
        self.left: set[int] = set()  # ranks that need no more answers
        self.handed: deque[Array] = deque()  # arrays of the worker in this process, to be taken
        self.wanted: deque[Sequence[Array]] = deque()  # its arrays that answers fill
        self._answers: deque[Work] = deque()  # under way
        self._asking: dict[tuple[int, int], int] = {}  # (shard, worker) -> rank
        self._pushed: dict[int, list[deque[Request]]] = {}  # worker -> pushes to each shard
        self._tracer: Tracer | None = None
        self._log: Path | None = None
        self._file: MetricsFile | None = None
        self._together = all(shard.together for shard in self.shards)

    def record(self, run: Path, number: int, tracer: Tracer | None) -> None:
        """Append every update to a file in the folder of the run, and give spans to `tracer`.

        Updates are then no longer kept in memory. The file of server `number` begins with the first
        update: the run has put its folder in order by then.
        """
        self._log, self._tracer = run / SERVER_LOG.format(number), tracer

    def _write_log(self) -> None:
        """Write the updates since the last call. All shards that log have the same ones."""
        if self._log is None or not self.shards[0].log:
            return
        if self._file is None:
            self._file = MetricsFile(self._log)
        for line in self.shards[0].log:
            self._file.write(step=line.clock + 1, **line._asdict())
        for shard in self.shards:
            shard.log.clear()

    def serve(self, num_ranks: int) -> None:
        """Answer until `num_ranks` ranks have left. Sleeps while there is nothing to do."""
        pause, longest = SLEEP_SECONDS
        while len(self.left) < num_ranks:
            if self.poll():
                pause = SLEEP_SECONDS[0]
                continue
            time.sleep(pause)
            pause = min(longest, 1.5 * pause)

    def poll(self) -> bool:
        """Handle one request if there is one; return whether there was."""
        while self._answers and self._answers[0].test():
            self._answers.popleft()
        source = self.wire.iprobe(HEADER)
        if source is None:
            return False
        header = self.wire.recv(np.empty(FIELDS), source, HEADER, kind="control")
        self.handle(source, Request.unpack(header))
        return True

    def handle(self, source: int, request: Request) -> None:
        """Do what a request of the wire's rank `source` asks for."""
        started = time.perf_counter()
        worker, index = self.place(source)
        shard = self.shards[index]
        self._asking[index, worker] = source
        if request.op == Op.PUSH:
            self._push(worker, index, request)
        elif request.op == Op.STEP:
            assert isinstance(shard, SyncShard)
            shard.step(request)
        elif request.op in (Op.PULL, Op.NORM):
            shard.waiting[worker] = request
        elif request.op == Op.COUNT:
            shard.version = int(request.version)
            self._send(source, [np.empty(0)], True)
        elif request.op == Op.LEAVE:
            self.left.add(source)
            shard.clocks[worker] = math.inf
        else:
            self._exchange(shard, source, request)
        self._answer_waiting(index)
        self._write_log()
        if self._tracer is not None:
            name = f"{Op(request.op).name.lower()} of worker {worker}"
            clock, end = int(request.clock), time.perf_counter()
            self._tracer.add(name, "server", started, end, clock=clock, version=shard.version)

    def _push(self, worker: int, index: int, request: Request) -> None:
        """Let a shard take a gradient, or all shards theirs once all of a worker have come.

        A gradient is received when it is taken.
        """
        waiting = self._pushed.setdefault(worker, [deque() for _ in self.shards])
        waiting[index].append(request)
        taken = range(len(self.shards)) if self._together else [index]
        if all(waiting[number] for number in taken):
            for number in taken:
                receive = partial(self._receive, source=self._asking[number, worker])
                self.shards[number].push(worker, waiting[number].popleft(), receive)

    def _answer_waiting(self, index: int) -> None:
        """Answer the requests that need not wait any longer, in the order of the workers."""
        shard = self.shards[index]
        for worker, request in sorted(shard.waiting.items()):
            if request.op == Op.NORM:
                assert isinstance(shard, SyncShard)
                if shard.complete:
                    del shard.waiting[worker]
                    self._send(self._asking[index, worker], [np.array([shard.squares()])], True)
                continue
            asked = self.shards if self._together else [shard]
            if all(each.waits(worker) for each in asked):
                found = [each.waiting.pop(worker).numbers for each in asked]
                numbers = tuple(map(max, zip(*found, strict=True)))
                reply = asked[0].reply(worker, request._replace(numbers=numbers))
                for each in asked:
                    self.answer(self.shards.index(each), worker, reply)

    def answer(self, index: int, worker: int, reply: np.ndarray) -> None:
        """Send a header and the weights of a shard to a worker."""
        source, buffers = self._asking[index, worker], self.shards[index].buffers
        self._send(source, [reply, *(b.values for b in buffers)])

    def _exchange(self, shard: Shard, source: int, request: Request) -> None:
        """Answer GET or SET."""
        stage, kind, start, stop = (int(number) for number in request.numbers)
        first = shard.buffers[stage].parts[0].start
        held = shard.arrays(stage)[kind][start - first : stop - first]
        if request.op == Op.GET:
            self._send(source, [held], True)
            return
        self._receive(held, source)
        shard.overwritten()
        self._send(source, [held[:0]], True)

    def _receive(self, out: Array, source: int) -> None:
        if source == self.own:
            out[...] = self.handed.popleft()
        else:
            self.wire.recv(out, source, DATA)

    def _send(self, dest: int, arrays: Sequence[Array], control: bool = False) -> None:
        """Send an answer: a header, then weights; or one array of `control`."""
        if dest == self.own:
            for out, array in zip(self.wanted.popleft(), arrays, strict=True):
                out[...] = array
            return
        for number, array in enumerate(arrays):
            kind = "control" if control or number == 0 else "payload"
            if self.own is None:
                self.wire.send(array, dest, REPLY, kind)
            else:  # the other worker may itself be answering: neither may wait
                self._answers.append(self.wire.isend(array.copy(), dest, REPLY, kind))
