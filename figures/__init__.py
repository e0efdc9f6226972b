"""What the reader looks at: each module draws one still figure, each .js moves one."""
