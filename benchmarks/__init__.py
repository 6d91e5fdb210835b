"""Speed and memory, ours against peers, one command each."""
