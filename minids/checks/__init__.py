"""What is refused, and in which words: checks that run before anything is computed."""
