"""What serving adds to the model: so far, the pages of its cache."""
