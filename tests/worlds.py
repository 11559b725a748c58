"""Worlds of ranks for tests: processes that stay, and run one function after the other."""

import multiprocessing
import os
import pickle
import time
import traceback

import torch
import torch.distributed as dist

from gpipe.testing import accelerators


class World:
    """A torch.distributed world on this machine; with ``hosts``, in namespaces of it, one a rank."""

    def __init__(self, ranks, backend="gloo", hosts=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "gpipe.distributed", "nets"])
        address = hosts[0].first if hosts else "127.0.0.1"
        ends = [context.Pipe() for _ in range(ranks)]
        self._pipes = [ours for ours, _ in ends]
        self.processes = [
            context.Process(
                target=_serve, args=(rank, ranks, address, theirs, backend, hosts and hosts[rank]), daemon=True
            )
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()
        port = self._pipes[0].recv()
        for pipe in self._pipes[1:]:
            pipe.send(port)

    def run(self, function, *args, seconds=30):
        """``function(rank, *args)`` on every rank; what each returned, or the exception it raised."""
        self.start(function, *args)
        return self.results(range(len(self.processes)), seconds)

    def start(self, function, *args):
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))

    def results(self, ranks, seconds=30):
        deadline = time.monotonic() + seconds
        found = []
        for rank in ranks:
            ready = self._pipes[rank].poll(max(0.0, deadline - time.monotonic()))
            assert ready, f"rank {rank} gave no answer in {seconds} s"
            found.append(pickle.loads(self._pipes[rank].recv_bytes()))
        return found

    def values(self, function, *args, seconds=30):
        """The same where no rank may raise."""
        results = self.run(function, *args, seconds=seconds)
        for rank, result in enumerate(results):
            assert not isinstance(result, Raised), f"rank {rank}: {result.text}"
        return results

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
        self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


class Raised:
    """An exception of another process."""

    def __init__(self, error, seconds):
        self.type = type(error).__name__
        self.message = str(error)
        self.notes = list(getattr(error, "__notes__", ()))
        self.text = "".join(traceback.format_exception(error))
        self.seconds = seconds


def _serve(rank, ranks, address, pipe, backend, host):
    torch.set_num_threads(1)
    if accelerators.COUNT in os.environ:  # set where this process's parent has simulated accelerators
        accelerators.start(int(os.environ[accelerators.COUNT]))
    if host is not None:
        host.enter()
    # otherwise looks this machine's name up, which may take 5 seconds
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if host is None else host.interface
    dist.init_process_group(backend, store=_store(rank, address, pipe), rank=rank, world_size=ranks)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            result = function(rank, *args)
        except BaseException as error:
            result = Raised(error, time.monotonic() - start)
        if accelerators.started() and accelerators.reports():
            result = _reported(result)
        pipe.send_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _reported(result):
    """What this process's simulated accelerators found, in place of a result or beside an exception."""
    found = "\n".join(accelerators.reports())
    accelerators.clear()
    if isinstance(result, Raised):
        result.text += f"\nreported by simulated accelerators:\n{found}"
        return result
    return Raised(AssertionError(f"reported by simulated accelerators:\n{found}"), 0.0)


def _store(rank, address, pipe):
    """The world's: rank 0 opens it at a port that is free, and says which."""
    if rank:
        return dist.TCPStore(address, pipe.recv())
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    return store
