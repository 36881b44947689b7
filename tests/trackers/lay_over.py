"""Let the environment of this interpreter import what that of another one has: `lay_over.py .venv/bin/python`.

`addsitedir` also reads the other's `.pth` files, which say where this project is.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

other = subprocess.run(
    [sys.argv[1], "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
    capture_output=True,
    text=True,
    check=True,
).stdout.strip()
Path(sysconfig.get_path("purelib"), "other.pth").write_text(f"import site; site.addsitedir({other!r})\n")
