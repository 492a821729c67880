"""The demo: fine-tunes a small GPT and a conv net with torch's AMP and with fusedamp, for comparison."""

from fusedamp.commands.demo.options import DemoError, Options, add_arguments, options_from

__all__ = ["DemoError", "Options", "add_arguments", "options_from"]
