"""What is measured on the user's data, and what is fitted to it."""
