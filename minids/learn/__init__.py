"""What goes with the book: the machine check and the guided tour."""
