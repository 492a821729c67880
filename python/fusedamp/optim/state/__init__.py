"""How masters and states are stored, converted, saved and loaded."""
