"""Runs Snakemake in forks of a process that has imported it, as a script of :mod:`snakemakes`.

Importing Snakemake and its plugins takes most of the time of a dry run. This process imports them
once and nothing of kvquant, so that each fork reads the workflow and the package as a new process
does. Requests are lines of JSON on standard input; the answer to each is a line with the exit
status on standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

OWN_PATH = [folder for folder in sys.path if folder.startswith((sys.prefix, sys.base_prefix))]


def become(request: Mapping[str, Any]) -> list[str]:
    """Turns this fork into the process that a request describes; returns its arguments."""
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    added = [os.path.abspath(f) for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f]
    # As `python -m` does it.
    sys.path[:] = [os.getcwd(), *added, *(folder for folder in OWN_PATH if folder not in added)]
    return list(request["args"])


def serve() -> list[str]:
    """Answers requests until there are no more; returns the arguments in each fork."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import snakemake.cli

    importlib.import_module("smart_open")  # by which Snakemake opens its first file
    snakemake.cli.get_argument_parser()  # imports the plugins
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"kvquant", "torch", "pynvml"}, "a fork would not import these itself"
    sys.argv = ["snakemake", *serve()]
    snakemake.cli.main()
