"""`report_to`: which trackers it names, without importing one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainwright.interop.optional import MissingExtra, is_installed
from trainwright.interop.trackers import TRACKERS, installed_trackers, resolve_report_to
from trainwright.tracking.base import get_reporting_integration_callbacks

DOCUMENTED = {
    "azure_ml": "AzureMLCallback",
    "comet_ml": "CometCallback",
    "mlflow": "MLflowCallback",
    "neptune": "NeptuneCallback",
    "tensorboard": "TensorBoardCallback",
    "trackio": "TrackioCallback",
    "wandb": "WandbCallback",
    "codecarbon": "CodeCarbonCallback",
    "clearml": "ClearMLCallback",
    "dagshub": "DagsHubCallback",
    "flyte": "FlyteCallback",
    "dvclive": "DVCLiveCallback",
    "swanlab": "SwanLabCallback",
    "kubeflow": "KubeflowCallback",
}


def fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_documented_name_leads_to_the_documented_class():
    names = {name: cls.__name__ for name, cls in zip(DOCUMENTED, get_reporting_integration_callbacks([*DOCUMENTED]))}
    assert names == DOCUMENTED
    assert set(TRACKERS) == set(DOCUMENTED)


@pytest.mark.parametrize("nothing", ["none", [], ["none"], ()])
def test_none_and_an_empty_list_name_no_tracker(nothing):
    assert resolve_report_to(nothing) == []


@pytest.mark.parametrize("everything", [None, "all", ["all"], ["all", "all"]])
def test_all_is_every_installed_tracker_once(everything):
    found = resolve_report_to(everything)
    assert found == installed_trackers()
    assert ("tensorboard" in found) == (is_installed("tensorboard") or is_installed("tensorboardX"))


def test_names_keep_their_order_and_appear_once():
    assert resolve_report_to(["wandb", "mlflow", "wandb"]) == ["wandb", "mlflow"]
    assert resolve_report_to("dvclive") == ["dvclive"]


def test_a_misspelt_name_is_answered_with_the_allowed_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"report_to=\['tensorbord'\].*'wandb'.*Did you mean 'tensorboard'\?"):
        resolve_report_to(["tensorbord"])


def test_none_next_to_a_tracker_is_a_contradiction():
    with pytest.raises(ValueError, match="no tracker and for some"):
        resolve_report_to(["none", "wandb"])


def test_a_tracker_that_works_only_inside_its_service_joins_all_only_there(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    assert "kubeflow" not in resolve_report_to("all")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "https://controller/status")
    assert "kubeflow" in resolve_report_to("all")
    monkeypatch.setenv("DISABLE_KUBEFLOW_INTEGRATION", "TRUE")
    assert "kubeflow" not in resolve_report_to("all")


def test_a_tracker_that_is_not_installed_is_refused_with_the_pip_command():
    absent = [row for row in TRACKERS.values() if row.missing]
    if not absent:
        pytest.skip("every tracker is installed here")
    for row in absent:
        (callback_class,) = get_reporting_integration_callbacks(row.name)
        with pytest.raises(MissingExtra, match=rf"report_to='{row.name}'.*trainwright\[{row.extra}\]"):
            callback_class()


def test_resolving_all_imports_no_tracker_and_no_torch():
    packages = ["torch", "wandb", "mlflow", "comet_ml", "neptune", "clearml", "dvclive", "codecarbon", "swanlab"]
    packages += ["trackio", "tensorboard", "flytekit", "azureml.core", "dagshub", "transformers", "accelerate"]
    code = (
        "import sys; from trainwright.interop.trackers import resolve_report_to; resolve_report_to('all'); "
        f"print([name for name in {packages} if name in sys.modules])"
    )
    assert fresh_interpreter(code) == "[]"


def test_importing_every_callback_file_imports_no_tracker():
    packages = ["wandb", "mlflow", "comet_ml", "neptune", "clearml", "dvclive", "codecarbon", "swanlab", "trackio"]
    packages += ["tensorboard", "flytekit", "azureml.core", "dagshub"]
    code = (
        "import sys; from trainwright.interop.trackers import TRACKERS; "
        "from trainwright.tracking.base import get_reporting_integration_callbacks as get; "
        f"get(list(TRACKERS)); print([name for name in {packages} if name in sys.modules])"
    )
    assert fresh_interpreter(code) == "[]"
