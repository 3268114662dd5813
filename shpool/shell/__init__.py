"""Shell jobs: a command line per job, its fields quoted, its processes ended with it.

``template`` parses and fills the command line, ``command`` runs one and ends whatever it started, ``capture`` keeps
what it printed, ``job`` is what a worker calls.
"""

from __future__ import annotations

from shpool.shell.job import ShellCall, ShellResult

__all__ = ["ShellCall", "ShellResult"]
