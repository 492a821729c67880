"""The demo: a small GPT and a conv net, fine-tuned with torch's AMP and with fusedamp, side by side."""

from fusedamp.commands.demo.options import DemoError, Options, add_arguments, options_from

__all__ = ["DemoError", "Options", "add_arguments", "options_from"]
