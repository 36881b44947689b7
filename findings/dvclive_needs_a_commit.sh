#!/usr/bin/env bash
# Expected: Live() in a Git repository without a commit warns that no experiment can be saved ("Can't save experiment to an
# empty Git Repo", as its code says) and writes metrics and parameters, as it does outside of any repository.
# What happens: it asks for the last commit before it looks whether there is one, so that Live() raises SCMError; no argument
# avoids it, save_dvc_exp=False neither. The warning is never reached.
# Seen with dvclive 3.49.1 and dvc 3.67.1 on Linux, Python 3.11:
#   Live(): SCMError: Empty git repo
#   Live(save_dvc_exp=False): SCMError: Empty git repo
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q dvclive==3.49.1
git init -q "$folder/repository"
cd "$folder/repository"
cat > "$folder/look.py" <<'PY'
from dvclive import Live

errors = []
for arguments in ({}, {"save_dvc_exp": False}):
    try:
        Live(**arguments)
        said = "made"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(f"Live({', '.join(f'{name}={value}' for name, value in arguments.items())}): {said}")
    errors.append(said)
assert errors == ["SCMError: Empty git repo"] * 2
PY
DVC_NO_ANALYTICS=true "$folder/env/bin/python" "$folder/look.py"
