"""DagsHub: its metrics and settings are MLflow's. `test_dagshub.py` has the rest, with a server."""

from __future__ import annotations

from readers import mlflow


class Reader(mlflow.Reader):
    name = "dagshub"
    distribution = "dagshub"
