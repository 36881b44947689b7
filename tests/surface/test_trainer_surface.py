"""Methods of the trainers, their parameters and defaults, compared with both documented generations.

`data/trainer_methods.json`: generation -> class -> method -> parameter -> its default as Python text, or null.
"""

import ast
import inspect
import json
from pathlib import Path

import pytest

from trainwright import Seq2SeqTrainer, Trainer

SURFACE = json.loads((Path(__file__).parent / "data" / "trainer_methods.json").read_text())
CLASSES = {"Trainer": Trainer, "Seq2SeqTrainer": Seq2SeqTrainer}
METHODS = [
    pytest.param(CLASSES[name], method, parameters, id=f"{generation}-{name}-{method}")
    for generation, classes in SURFACE.items()
    for name, methods in classes.items()
    for method, parameters in methods.items()
]


@pytest.mark.parametrize("generation", SURFACE)
@pytest.mark.parametrize("name", CLASSES)
def test_every_documented_method_exists(generation, name):
    assert [method for method in SURFACE[generation][name] if not hasattr(CLASSES[name], method)] == []


@pytest.mark.parametrize("cls, method, documented", METHODS)
def test_a_method_takes_the_documented_parameters_in_their_order_with_their_defaults(cls, method, documented):
    function = getattr(cls, method, None)
    if function is None:
        pytest.skip("its absence is reported by the test above")
    ours = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in ours)
    expected = [name for name in documented if not name.startswith("**")]
    assert takes_any_keyword or len(expected) == len(documented)
    assert [p.name for p in ours][: len(expected)] == expected
    for parameter in ours[: len(expected)]:
        default = documented[parameter.name]
        if default is None:  # ours may be more lenient than the documented one
            continue
        assert parameter.default == ast.literal_eval(default), parameter.name
    for extra in ours[len(expected) :]:
        is_optional = extra.default is not extra.empty or extra.kind in (extra.VAR_KEYWORD, extra.VAR_POSITIONAL)
        assert is_optional, f"{extra.name} is not documented, so callers do not pass it"


@pytest.mark.parametrize("name", ["get_optimizer_cls_and_kwargs", "num_tokens", "metrics_format"])
def test_static_methods_can_be_called_without_a_trainer(name):
    assert isinstance(inspect.getattr_static(Trainer, name), staticmethod)


def test_a_hook_explains_itself():
    silent = [
        name
        for name, method in vars(Trainer).items()
        if inspect.isfunction(method) and name in SURFACE["5.23"]["Trainer"] and not inspect.getdoc(method)
    ]
    allowed = {"_deactivate_neftune", "__init__"}  # one line of code; the class says it
    assert set(silent) <= allowed
