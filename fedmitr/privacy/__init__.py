"""What leaks from what clients send: membership, reconstruction; and what protecting it costs."""
