"""Number formats of eight bits and fewer digits, groups that share a scale, sums that lose bits."""
