"""One experiment a file: get_config(arg) -> Experiment."""
