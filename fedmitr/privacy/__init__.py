"""What leaks from what clients send, and what protecting it costs."""
