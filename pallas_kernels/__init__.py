"""The ops: one folder each, one public function each, with a readable reference beside every fast path."""
