"""The order of the shelves: what stands on what, and that no import runs back up or in a circle.

What is counted: every import of a module of this package, at the top of a file or inside a function, but not those for
type checkers only (`if TYPE_CHECKING`), which run nowhere. A shelf is a directory, or a module next to them. An arrow
is a file and the shelf that it imports from, however many names it takes from there.
"""

import ast

from imports import FILES, PACKAGE, dotted, imported_modules, package_of

# From the ground up. A shelf imports from those before it only.
ORDER = """
    names importing argtypes argparser forks outputs plan metrics window tokens log_values log_text log_output redact
    safe_write gradients shards overflow seeding nested loss interop linear_loss micro_batch_weights splitting
    optim args data parallel interrupt nonfinite checkpoint techniques oom_retry preflight evaluation profiling
    state callbacks tracking report hub search
    hooks run checks plan_report trainer seq2seq
    compat tasks config_file plan_script dropin completion commands cli __main__
""".split()  # noqa: SIM905

# `Trainer(...)` and `train(...)` accept older names of their arguments, which are translated where they enter.
DOORS = {("trainer", "compat")}
MODULES = {dotted(path) for path in FILES}


def shelf_of(module):
    """The shelf of a full module name; the package itself, which imports nothing, is none."""
    return module.split(".")[1] if "." in module else None


def imports_that_run(text, package):
    """Full names of the modules of ours that a file of `package` imports when it, or a function in it, runs."""
    found = set()

    def visit(node):
        found.update(name for name in imported_modules(node, package) if name in MODULES)
        skipped = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
        for child in ast.iter_child_nodes(node):
            if child not in skipped:
                visit(child)

    visit(ast.parse(text))
    return found


def arrows():
    """(file, its shelf, the shelf it imports from), without imports inside a shelf."""
    found = set()
    for path in FILES:
        shelf = shelf_of(dotted(path))
        for module in imports_that_run(path.read_text(encoding="utf-8"), package_of(path)):
            if shelf and shelf_of(module) not in (None, shelf):
                found.add((str(path.relative_to(PACKAGE)), shelf, shelf_of(module)))
    return found


def circles(pairs):
    """Shelves that import each other in a circle, in sets; each of the rest can be taken away as a ground floor."""
    graph = {}
    for upper, lower in pairs:
        graph.setdefault(upper, set()).add(lower)
    reach = {shelf: set(lowers) for shelf, lowers in graph.items()}
    for middle in reach:
        for lowers in reach.values():
            if middle in lowers:
                lowers |= reach[middle]
    return {
        frozenset(s for s in lowers if shelf in reach.get(s, ())) for shelf, lowers in reach.items() if shelf in lowers
    }


def test_every_shelf_has_its_place_in_the_order():
    assert {shelf_of(module) for module in MODULES} - {None} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_no_import_runs_back_up_but_where_a_value_enters():
    place = {shelf: number for number, shelf in enumerate(ORDER)}
    back_up = {arrow for arrow in arrows() if place[arrow[2]] > place[arrow[1]]}
    assert {arrow[1:] for arrow in back_up} <= DOORS, sorted(back_up)
    assert len(back_up) <= 1, sorted(back_up)


def test_no_shelves_import_each_other_in_a_circle():
    assert circles({arrow[1:] for arrow in arrows()}) == set()


def test_the_search_for_circles_finds_one():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")}) == {frozenset("abc")}
    assert circles({("a", "b"), ("b", "c"), ("a", "c")}) == set()


def test_imports_are_counted_inside_functions_and_not_for_type_checkers():
    text = """
from typing import TYPE_CHECKING
from ..names import closest
if TYPE_CHECKING:
    from trainwright.hub import push
else:
    from trainwright import state
def load():
    from trainwright import trainer
    import trainwright.data.loaders
"""
    expected = {"trainwright", "trainwright.names", "trainwright.state", "trainwright.trainer"}
    assert imports_that_run(text, "trainwright.optim") == expected | {"trainwright.data.loaders"}
