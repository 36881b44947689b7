"""These tests make environments and install packages: only `make test-minimal`, which says where, collects them."""

import os

ROOT = os.environ.get("TRAINWRIGHT_MINIMAL")  # made by make: base/ (a virtual environment) and the wheel of the project

collect_ignore_glob = [] if ROOT else ["test_*.py"]
