"""The command line: python -m gem_fast --help."""

from gem_fast.paper.cli import main

raise SystemExit(main())
