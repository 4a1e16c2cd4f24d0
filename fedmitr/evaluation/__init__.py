"""What is measured: accuracy, foreground, operations, bytes, speed."""
