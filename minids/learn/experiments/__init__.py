"""The longer experiments of chapters, each with its log beside it."""
