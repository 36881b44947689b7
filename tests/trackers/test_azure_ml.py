"""Azure Machine Learning: steps of a submitted run, and a run that is given."""

from __future__ import annotations

import pytest

import scenarios
from battery import needs, program
from readers import azure_ml as reading
from trainwright.tracking.base import tracker_class

pytestmark = pytest.mark.xdist_group("azure_ml")
READER = reading.Reader()


@pytest.fixture(autouse=True)
def installed():
    needs("azure_ml")


def test_a_submitted_run_gets_the_step_of_each_value(tmp_path):
    """A `Run` needs the service; the one here takes what it takes and stores it."""

    def action():
        from azureml.core.run import Run

        stored = []

        class Submitted(Run):
            def __init__(self):
                pass

            def _log(self, name, value, description="", step=None):
                stored.append((name, step))

            def flush(self, timeout_seconds=300):
                stored.append(("flush", None))

        # As the package has it, so that an argument which it does not know is an error.
        def log(self, name, value, description="", step=None):
            self._log(name, value, description, step)

        import inspect

        assert list(inspect.signature(Run.log).parameters) == list(inspect.signature(log).parameters)
        Submitted.log = log
        callback = tracker_class("azure_ml")(Submitted())
        scenarios.trainer(_Given(), "first", (callback,), max_steps=2, save_strategy="no", eval_strategy="no").train()
        return stored

    stored = program(READER, tmp_path, action)
    assert [step for name, step in stored if name == "loss"] == [1, 2] and stored[-1][0] == "flush"


class _Given(reading.Reader):
    name = "none"
