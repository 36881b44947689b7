"""What a program finds that `trainwright run` started, also in processes that it starts itself; prints JSON."""

import json
import multiprocessing
import os
import pickle
import sys

import tiny_task
from transformers import Trainer, TrainingArguments


class OfMain:
    def __eq__(self, other):
        return type(other) is OfMain


class MainTrainer(Trainer):
    pass


def work(queue, value):
    queue.put([Trainer.__module__, MainTrainer.__mro__[1].__module__, __name__, value == OfMain()])


def in_child(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=work, args=(queue, OfMain()))
    child.start()
    answer = queue.get(timeout=120)
    child.join()
    return answer


if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    answers = {
        "argv": sys.argv[1:],
        "argv[0]": os.path.samefile(sys.argv[0], __file__),
        "path": os.path.realpath(sys.path[0]) == (os.getcwd() if "as module" in sys.argv else here),
        "main": [
            sys.modules["__main__"].__file__ == __file__,
            __spec__ is None,
            sys.modules["__main__"].OfMain is OfMain,
        ],
        "pickle": pickle.loads(pickle.dumps(OfMain())) == OfMain(),
        "trainer": [Trainer.__module__, TrainingArguments("out", use_cpu=True).report_to],
        "task": tiny_task.__name__,
    }
    if "spawn" in sys.argv:
        answers["children"] = {method: in_child(method) for method in ("spawn", "forkserver")}
    print(json.dumps(answers))
    sys.exit(7)
