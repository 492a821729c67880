"""``make evidence``: checks and measurements that need a GPU."""
