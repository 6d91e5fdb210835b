"""From text to a corpus of token ids: ``python -m tools.prepare``; `tasks.prepared` says what it writes."""
