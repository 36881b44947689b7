"""`trainwright train`: a file, checked, and then done.

Owns: the order of both, and the exit codes. Leaves to others: everything in between (`reading.py`, `check.py`,
`tasks/`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainwright.config_file.check import Job, check, in_words_of_the_file, wrong_setting
from trainwright.config_file.reading import ConfigFileError, read
from trainwright.interop.optional import MissingExtra
from trainwright.tasks.errors import DataError, message_of


def job_of(path: str, overrides: Sequence[str]) -> Job | None:
    """What the file `path` asks for, changed by `overrides`; None where it is wrong, and stderr says why."""
    try:
        return check(read(path, overrides))
    except ConfigFileError as error:
        print(error, file=sys.stderr)
        return None


def train(job: Job) -> int:
    """Do `job`. Returns the exit code: 0, or 2 where data, model or a setting do not fit, and stderr says why."""
    try:
        job.run()
    except (DataError, MissingExtra) as error:
        print(f"trainwright train: {in_words_of_the_file(message_of(error), job)}", file=sys.stderr)
        return 2
    except ValueError as error:
        if (text := wrong_setting(error, job)) is None:
            raise
        print(f"trainwright train: {text}", file=sys.stderr)
        return 2
    return 0
