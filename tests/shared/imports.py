"""The files of the package, and what an import statement in one of them reads."""

import ast
from pathlib import Path

import trainwright

PACKAGE = Path(trainwright.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path):
    """The package to which relative imports in a file refer."""
    return dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]


def imported_modules(node, package):
    """Full names of the modules (and of the names, which may be modules) that an import statement reads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])])
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []
