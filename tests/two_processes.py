"""Run jobs in two processes or more that form a gloo group on the CPU, and bring back what each gave or how it failed."""

import datetime
import os
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import processes

PATIENCE = 120.0
"""Seconds until two processes that have not ended are killed; a collective gives up after a quarter of it."""


def run_jobs(jobs, folder, count=2):
    """Run the jobs, `{name: f(rank) -> value}` of a module's top level, in each process: for each name its outcomes, by rank."""
    processes.context()  # names what is imported beforehand
    context = mp.start_processes(_work, args=(jobs, str(folder), count), nprocs=count, join=False, start_method=processes.NAME)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} processes did not end within {PATIENCE} seconds")
    finally:
        for process in context.processes:
            process.kill()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    return {name: [outcome[name] for outcome in ranks] for name in jobs}


def _work(rank, jobs, folder, count):
    torch.set_num_threads(1)
    os.chdir(folder)
    timeout = datetime.timedelta(seconds=PATIENCE / 4)
    # A file to meet at instead of a port, which another program might take.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=timeout)
    outcomes = {}
    for name, job in jobs.items():
        torch.manual_seed(0)
        try:
            outcomes[name] = (True, job(rank))
        except Exception:
            outcomes[name] = (False, traceback.format_exc())
    torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
