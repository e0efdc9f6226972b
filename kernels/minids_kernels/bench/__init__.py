"""One command times every kernel beside its floor, the card's measured ceilings and its peers."""
