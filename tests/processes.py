"""Fresh processes for tests: forked from one that has imported the libraries and has done nothing else, so that none imports them anew.

Functions that run in them belong here, or in a module that imports little besides.
"""

import multiprocessing
import os
import signal
import time

PRELOADED = ("transformers.models.llama.modeling_llama", "peft", "lora_lite", "gsm8k", "common.measure", "processes")
NAME = "forkserver"


def context():
    """Return the context whose processes are forked from that one."""
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    return multiprocessing.get_context(NAME)


def scaled(factor):
    """Return a measurement of fixed numbers, and of the process."""
    from common.measure import spread

    return {
        "a": {"b": spread([factor * 1.0, factor * 2.0, factor * 3.0]), "facts": {"width": 8}},
        "process": spread([os.getpid()]),
    }


def when():
    """Return the time."""
    from common.measure import spread

    return {"at": spread([time.monotonic()])}


def run_killed(place, calls, folder, s):
    """Do a run of `gsm8k.py` that kills its process at the `calls`-th call of a function of its training or its evaluation."""
    import gsm8k
    from common import gsm8k_data, gsm8k_train

    owner, name = {"train": (gsm8k_train, "batch"), "evaluate": (gsm8k_data, "right")}[place]
    real, seen = getattr(owner, name), []

    def deadly(*args, **more):
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)

    train = gsm8k_train.train
    gsm8k.train = lambda *args: train(*args, every=2)
    setattr(owner, name, deadly)
    gsm8k.run(s, folder)
