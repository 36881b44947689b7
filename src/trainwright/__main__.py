"""`python -m trainwright` is the `trainwright` command."""

from trainwright.cli import main

raise SystemExit(main())
