"""What the user passed, checked and brought to one form; nothing behind these modules sees it otherwise."""
