"""What is learned: data source, loss, metrics."""
