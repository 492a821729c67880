"""``make evidence``: what only a machine with a GPU can show, checked, measured and written down."""
