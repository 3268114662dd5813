"""`shpool completion`: the script with which a shell completes commands and options, and the answers it asks for.

All of it is typer's. Its own option is left out because that changes shell start-up files.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

VARIABLE = "_SHPOOL_COMPLETE"  # of the environment, by which the script asks: for what, and in which shell's form

_PROGRAM = "shpool"


class Shell(str, Enum):
    """Shells with a script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell.", show_default=False)],
) -> None:
    """Print the script that makes a shell complete commands and options; it changes nothing by itself.

    \b
    bash   shpool completion bash > ~/.shpool.bash
           and into ~/.bashrc:  source ~/.shpool.bash
    zsh    shpool completion zsh > ~/.shpool.zsh
           and into ~/.zshrc, below compinit:  source ~/.shpool.zsh
    fish   shpool completion fish > ~/.config/fish/completions/shpool.fish

    New shells have it then; `source <(shpool completion bash)` gives it to the present one.
    """  # noqa: D301 - click's mark for lines to be left as they are, which is a backspace
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # typer imports it there

    typer.echo(get_completion_script(prog_name=_PROGRAM, complete_var=VARIABLE, shell=shell.value))


def answer(command: Any, question: str) -> int:  # noqa: ANN401 - click's class, or typer's copy of it
    """Print what such a script asks for, and return the exit code.

    Args:
        command: The command line as a whole.
        question: Value of ``VARIABLE``, such as ``complete_bash``.
    """
    from typer.completion import completion_init, shell_complete  # type: ignore[attr-defined]  # as above

    completion_init()
    return shell_complete(command, {}, _PROGRAM, VARIABLE, question)
