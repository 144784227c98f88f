"""What runs inside one group of training processes."""
