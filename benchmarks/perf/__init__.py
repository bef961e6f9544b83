"""Speed and memory: measurements beside the peers."""
