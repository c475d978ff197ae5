"""Freed memory stays in the process, where glibc is, and where its user has not said otherwise."""

import subprocess
import sys

import pytest

CODE = "from condit.cli.memory import keep_memory; print(keep_memory())"


def said(**environment) -> str:
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    report = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=True)
    return report.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_users_own_settings_are_left_alone():
    assert said(MALLOC_TOP_PAD_="0") == "False"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_it_takes_effect_on_linux():
    import platform

    assert said() == str(platform.libc_ver()[0] == "glibc")
