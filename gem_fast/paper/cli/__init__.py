"""The command line: parses, runs a subcommand, prints one sentence where that fails."""

from gem_fast.paper.cli.main import main

__all__ = ["main"]
