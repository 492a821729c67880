"""Storage, conversion, saving and loading of masters and states."""
