"""These tests run in the VM alone: `python -m tests.vm tests/vm/guest/...`. On a host they are not even collected."""

from __future__ import annotations

from pathlib import Path

# Made by the VM's initramfs.
IN_THE_VM = Path("/run/vm/job").exists()

collect_ignore_glob = [] if IN_THE_VM else ["*"]
