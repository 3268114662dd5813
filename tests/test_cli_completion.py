"""`shpool completion`: its scripts work in real shells, and change no file."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from cli_shell import PATIENCE, Shell, assert_told

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture
def shell(tmp_path: Path, child_env: dict[str, str]) -> Shell:
    """Return a shell that finds `shpool` on its PATH."""
    (tmp_path / "path").mkdir()
    child_env["PATH"] = f"{tmp_path / 'path'}:{child_env['PATH']}"
    found = Shell(tmp_path, child_env)
    program = found.write("path/shpool", f'#!/bin/sh\nexec {shlex.join(found.command())} "$@"\n')
    program.chmod(0o755)
    return found


def run_in(shell: Shell, program: str, script: str) -> list[str]:
    """Run a script of another shell and return the words it prints."""
    done = subprocess.run(
        [program, "-c", script],
        cwd=shell.folder,
        env=shell.env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def completed_by_bash(shell: Shell, *words: str) -> list[str]:
    """Return what bash offers for the last word, as its key TAB asks for it."""
    line = shlex.join(words)
    script = (
        "source <(shpool completion bash)\n"
        'read -r -a registered <<<"$(complete -p shpool)"\n'
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n"
        '"${registered[-2]}" shpool "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return run_in(shell, "bash", script)


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")


@needs_bash
def test_bash_completes_commands(shell: Shell) -> None:
    assert completed_by_bash(shell, "shpool", "r") == ["run"]
    assert completed_by_bash(shell, "shpool", "config", "s") == ["show", "set"]


@needs_bash
def test_bash_completes_options_and_their_choices(shell: Shell) -> None:
    assert completed_by_bash(shell, "shpool", "run", "a:b", "jobs.csv", "--retr") == ["--retries"]
    assert completed_by_bash(shell, "shpool", "status", "run.db", "--watch", "--j") == ["--json"]
    assert completed_by_bash(shell, "shpool", "run", "--format", "c") == ["csv"]


@needs_bash
def test_bash_is_left_to_complete_names_of_files(shell: Shell) -> None:
    """Where nothing is offered bash does so: ``complete -o default``."""
    assert completed_by_bash(shell, "shpool", "status", "run") == []
    registered = run_in(shell, "bash", "source <(shpool completion bash); complete -p shpool")
    assert registered[:3] == ["complete", "-o", "default"]


@needs_fish
def test_fish_completes_commands(shell: Shell) -> None:
    words = run_in(shell, "fish", "shpool completion fish | source; complete -C 'shpool r'")
    assert words[0] == "run"


@pytest.mark.parametrize(("name", "line"), [("zsh", "#compdef shpool"), ("fish", "complete --command shpool")])
def test_the_scripts_of_other_shells_ask_as_typer_answers(shell: Shell, name: str, line: str) -> None:
    done = shell.run("completion", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(line)
    assert f"_SHPOOL_COMPLETE=complete_{name}" in done.stdout
    shell.env |= {"_SHPOOL_COMPLETE": f"complete_{name}", "_TYPER_COMPLETE_ARGS": "shpool r"}
    shell.env["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    asked = shell.run()
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "run" in asked.stdout
    assert "token" not in asked.stdout


def test_no_start_up_file_is_changed(shell: Shell, own_home: Path) -> None:
    assert shell.run("completion", "bash").returncode == 0
    assert list(own_home.iterdir()) == []
    assert "--install-completion" not in shell.run("--help").stdout


def test_another_shell_is_bad_usage(shell: Shell) -> None:
    assert_told(shell.run("completion", "tcsh"), 2, "tcsh", "bash", "zsh", "fish")


def test_the_help_tells_where_to_put_the_script(shell: Shell) -> None:
    told = shell.run("completion", "--help").stdout
    for words in ("~/.bashrc", "~/.zshrc", "~/.config/fish/completions/shpool.fish"):
        assert words in told
